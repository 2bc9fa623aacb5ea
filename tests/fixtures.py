"""Fixtures that many test files share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tiny import make_tiny_backbone, make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard.evaluation.random_models import random_detoxifier
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone


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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny_model(make_tiny_config("llama")).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detoxifier_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detoxifiers") / "random"
    random_detoxifier(load_backbone(tiny_folder, device="cpu"), virtual_tokens=4).save(folder)
    return folder
