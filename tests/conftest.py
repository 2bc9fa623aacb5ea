"""Fixtures that many test files share."""

from __future__ import annotations

import pytest
from tiny import make_tiny_backbone

from detox_guard.backbone import Backbone, load_backbone


@pytest.fixture
def tiny_gpt2() -> Backbone:
    """Fresh for each test: an engine packs its backbone's weights in place."""
    return make_tiny_backbone("gpt2")


@pytest.fixture
def tiny_llama() -> Backbone:
    """Fresh for each test: an engine packs its backbone's weights in place."""
    return make_tiny_backbone("llama")


@pytest.fixture(scope="session")
def default_backbone() -> Backbone:
    """The embedded default in float32; the first run on a machine downloads and converts it (about a minute)."""
    return load_backbone(dtype="float32")
