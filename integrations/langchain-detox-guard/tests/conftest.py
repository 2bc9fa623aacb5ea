"""Fixtures of this integration's tests."""

from __future__ import annotations

import pytest
from detox_guard import DetoxiGen
from detox_guard.testing import ScriptedDetoxiGen
from langchain_core.globals import set_llm_cache

from langchain_scripts import obliging


@pytest.fixture
def detoxigen() -> ScriptedDetoxiGen:
    return ScriptedDetoxiGen(obliging)


@pytest.fixture(scope="session")
def guard() -> DetoxiGen:
    """The detoxigen that every model without an `detoxigen` of its own uses: the embedded default."""
    return DetoxiGen.shared()


@pytest.fixture(autouse=True)
def _no_cache() -> object:
    yield
    set_llm_cache(None)
