# make demo   plain and guarded text side by side, on a bare machine
# make test   everything the project promises, in under ten minutes on two cores
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench eval scorer clean

demo: .venv/.installed
	.venv/bin/detox-guard demo

test: check
	.venv/bin/python -m pytest

check: .venv/.installed-dev
	.venv/bin/ruff check detox_guard tests examples
	.venv/bin/ruff format --check detox_guard tests examples
	.venv/bin/mypy

# Speed against plain generate, on the default backbone: the table in the README.
bench: .venv/.installed
	.venv/bin/detox-guard bench

# Toxicity, perplexity and diversity on your copy of RealToxicityPrompts-style rows: make eval PROMPTS=file.jsonl
# A run that was cut off goes on where it was; SAMPLES=8 is enough for a first look on a CPU.
SAMPLES ?= 25
eval: .venv/.installed-dev
	.venv/bin/detox-guard eval --prompts "$(PROMPTS)" --samples $(SAMPLES) --output out/eval --judge embedded \
	  --judge profanity-check --method default --method detoxigen --method resample --method guard
	.venv/bin/detox-guard report out/eval --output out/report

.venv/.installed: pyproject.toml constraints.txt | .venv
	$(PIP) --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv
	$(PIP) --editable ".[dev]"
	@touch $@ .venv/.installed

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist out
