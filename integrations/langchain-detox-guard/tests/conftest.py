"""Fixtures of this integration's tests."""

from __future__ import annotations

import pytest
from detox_guard import DetoxiGen
from detox_guard.testing import ScriptedDetoxiGen
from langchain_core.globals import set_llm_cache

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM
from langchain_scripts import obliging


@pytest.fixture
def detoxigen() -> ScriptedDetoxiGen:
    return ScriptedDetoxiGen(obliging)


@pytest.fixture
def chat(detoxigen: ScriptedDetoxiGen) -> ChatDetoxiGen:
    return ChatDetoxiGen(detoxigen=detoxigen, seed=1)


@pytest.fixture
def llm(detoxigen: ScriptedDetoxiGen) -> DetoxiGenLLM:
    return DetoxiGenLLM(detoxigen=detoxigen, seed=1)


@pytest.fixture(scope="session")
def default_model() -> DetoxiGen:
    """The model of whoever names none: the embedded default."""
    return DetoxiGen.shared()


@pytest.fixture(autouse=True)
def _no_cache() -> object:
    yield
    set_llm_cache(None)
