"""Fixtures of this integration's tests."""

from __future__ import annotations

import pytest
from detox_guard import DetoxiGen
from langchain_core.globals import set_llm_cache

from scripted_engine import ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="session")
def guard() -> DetoxiGen:
    """The engine that every model without an `engine` of its own uses: the embedded default."""
    return DetoxiGen.shared()


@pytest.fixture(autouse=True)
def _no_cache() -> object:
    yield
    set_llm_cache(None)
