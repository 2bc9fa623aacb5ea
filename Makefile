# make demo   plain and guarded text side by side, on a bare machine
# make serve  the model for OpenAI's clients, with a page to try it, on http://127.0.0.1:8000
# make test   everything the project promises, in under ten minutes on two cores
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

LANGCHAIN = integrations/langchain-detox-guard
LLAMA_INDEX = integrations/llama-index-llms-detox-guard
RAY = integrations/ray-detox-guard
# One process a core, each with one thread of arithmetic: two pools of threads on two cores slow each other down.
PYTEST = OMP_NUM_THREADS=1 $(CURDIR)/.venv/bin/python -m pytest -n 2 --dist worksteal -q

.PHONY: demo serve test test-ray test-llamacpp test-clients check wheels docs bench bench-rag bench-chains ablate eval registry clean

demo: .venv/.installed
	.venv/bin/detox-guard demo

serve: .venv/.installed-server
	.venv/bin/detox-guard serve

test: check wheels
	$(PYTEST)
	cd $(LANGCHAIN) && $(PYTEST)
	$(PYTEST) $(LLAMA_INDEX)/tests

# The Ray package, with two nodes on this machine: about six minutes, 5 GB of memory. Ray is large and starts many
# processes, so `make test` leaves it out.
test-ray: .venv/.installed-ray
	cd $(RAY) && $(CURDIR)/.venv/bin/mypy
	cd $(RAY) && OMP_NUM_THREADS=1 $(CURDIR)/.venv/bin/python -m pytest -q

# llama.cpp as a second runner, which `make test` does without. It is compiled once, into the user's cache.
test-llamacpp: .venv/.installed-dev
	.ci/llamacpp
	$(PYTEST) tests/engine -k llamacpp

# LiteLLM and LlamaIndex's OpenAILike against the server, in an environment of their own, before this one's packages:
# they want openai 2, and LiteLLM brings boto3.
test-clients: .venv/.installed-dev
	.venv/bin/python -m venv build/clients
	build/clients/bin/python -m pip install --quiet --disable-pip-version-check litellm llama-index-llms-openai-like
	.venv/bin/python -c "import site; print(site.getsitepackages()[0])" > \
	  "$$(build/clients/bin/python -c 'import site; print(site.getsitepackages()[0])')/others.pth"
	PYTHONPATH=$(CURDIR) build/clients/bin/python -m pytest -q tests/server/test_clients.py

# Weights rounded by torchao and bitsandbytes, which `make test` does without.
test-quantize: .venv/.installed-dev
	$(PIP) --editable ".[quantize]"
	$(PYTEST) tests/models/test_loading.py

check: .venv/.installed-dev
	.venv/bin/ruff check detox_guard tests examples integrations benchmarks
	.venv/bin/ruff format --check detox_guard tests examples integrations benchmarks
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	cd $(LANGCHAIN) && $(CURDIR)/.venv/bin/mypy
	cd $(LLAMA_INDEX) && $(CURDIR)/.venv/bin/mypy
	cd benchmarks && $(CURDIR)/.venv/bin/mypy

# The three wheels, in an environment that holds nothing else of this project.
wheels: .venv/.installed-dev
	rm -rf build/wheels build/clean
	.venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels . $(LANGCHAIN) $(LLAMA_INDEX)
	.venv/bin/python -m venv build/clean
	build/clean/bin/python -m pip install --quiet --no-deps --no-index build/wheels/*.whl
	.venv/bin/python -c "import site; print(site.getsitepackages()[0])" > build/clean/others.txt
	cd build/clean && PYTHONPATH="$$(cat others.txt)" bin/python $(CURDIR)/tests/wheel_smoke.py

# The site, in build/site.
docs: .venv/.installed-dev
	.venv/bin/mkdocs build --strict --quiet

# Speed against plain generate, on the default backbone.
bench: .venv/.installed-dev
	.venv/bin/python -m detox_benchmarks speed

# Which types of transformers can be steered: the table in docs/models.md, in about ten minutes.
registry: .venv/.installed-dev
	.venv/bin/python -m detox_benchmarks registry --into docs/models.md

# Toxicity, perplexity and diversity on your copy of RealToxicityPrompts-style rows: make eval PROMPTS=file.jsonl
# A run that was cut off goes on where it was; SAMPLES=8 is enough for a first look on a CPU.
SAMPLES ?= 25
eval: .venv/.installed-dev
	.venv/bin/python -m detox_benchmarks eval --prompts "$(PROMPTS)" --samples $(SAMPLES) --output out/eval --judge embedded \
	  --judge profanity-check --method default --method detoxigen --method resample --method guard
	.venv/bin/detox-guard report out/eval --output out/report

# Going on with documents with toxic passages among them, plain, guarded and behind the hook; the table in the LlamaIndex
# package's README: make bench-rag CORPUS=xquad.json TOXIC=prompts.jsonl
bench-rag: .venv/.installed-dev
	.venv/bin/python -m detox_benchmarks rag llama-index --corpus "$(CORPUS)" --toxic "$(TOXIC)" --out out/rag.jsonl \
	  --about thread --questions 100 --temperature 1 --samples 1 --judge embedded --judge profanity-check

# A LangChain chain that goes on with documents with toxic passages among them, plain and guarded; the table in that
# package's README: make bench-chains CORPUS=xquad.json TOXIC=prompts.jsonl
bench-chains: .venv/.installed-dev
	.venv/bin/python -m detox_benchmarks rag langchain --corpus "$(CORPUS)" --toxic "$(TOXIC)" --out out/chains.jsonl \
	  --about thread --questions 60 --samples 1 --temperature 1 --judge embedded --judge profanity-check

# Prompt tuning against LoRA and full fine-tuning of the detoxifier: make ablate DATA=toxic.jsonl PROMPTS=prompts.jsonl
ablate: .venv/.installed-dev
	.venv/bin/python -m detox_benchmarks ablate tuning --data "$(DATA)" --prompts "$(PROMPTS)" --output out/ablate-tuning

.venv/.installed: pyproject.toml constraints.txt | .venv
	$(PIP) --editable .
	@touch $@

.venv/.installed-server: .venv/.installed
	$(PIP) --editable ".[server]"
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt $(LANGCHAIN)/pyproject.toml $(LLAMA_INDEX)/pyproject.toml benchmarks/pyproject.toml | .venv
	$(PIP) --editable ".[dev]" --editable "$(LANGCHAIN)[dev]" --editable "$(LLAMA_INDEX)[dev]" --editable benchmarks
	@touch $@ .venv/.installed

.venv/.installed-ray: .venv/.installed-dev $(RAY)/pyproject.toml
	$(PIP) --editable "$(RAY)[dev]"
	@touch $@

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist out
