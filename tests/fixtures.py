"""Fixtures that many test files share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import random_detoxifier
from tiny import make_tiny_backbone, make_tiny_config, make_tiny_model, make_tiny_tokenizer
from waiting import wait_until

from detox_guard import DecodingParams, DetoxiGen, SteeringStream
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from detox_guard.models.backbone import Backbone

PARAMS = DecodingParams(alpha=1.5, max_new_tokens=30, seed=11)
"""What the `model` below is asked with."""


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
    random_detoxifier(load_backbone(tiny_folder, device="cpu"), width=4).save(folder)
    return folder


@pytest.fixture
def model() -> Iterator[DetoxiGen]:
    """A tiny model with a random detoxifier."""
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    with DetoxiGen(backbone, [SteeringStream(random_detoxifier(backbone))], params=PARAMS) as model:
        yield model
        # Whatever a test did, no seat is left taken and every token was steered.
        wait_until(lambda: held_by(model) == (0, 0, 0))
        stats = model.stats()
        assert stats.tokens_steered == stats.steps_steered


def held_by(model: DetoxiGen) -> tuple[int, int, int]:
    """Seats, rows and places of the queue that are taken."""
    stats = model.stats()
    return stats.seats, stats.rows, stats.queued
