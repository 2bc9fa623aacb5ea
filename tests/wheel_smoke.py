"""Run by `make wheels` in an environment with the built wheels: all three import from there and answer once."""

from __future__ import annotations

import sys
from pathlib import Path

import langchain_detox_guard
from llama_index.llms import detox_guard as llama_index_detox_guard

import detox_guard
from detox_guard.html import render

for module in (detox_guard, langchain_detox_guard, llama_index_detox_guard):
    where = Path(str(module.__file__)).resolve()
    assert where.is_relative_to(Path(sys.prefix).resolve()), f"{module.__name__} is not the wheel's: {where}"

chain = langchain_detox_guard.DetoxiGenLLM(max_tokens=4, seed=1, device="cpu")
engine = llama_index_detox_guard.DetoxiGenLLM(max_new_tokens=4, seed=1, device="cpu")
assert chain.invoke("The weather is") == str(engine.complete("The weather is", formatted=True))
assert "<title>" in render("playground.html", version="")
print("wheels: all three import and answer")
