"""A tiny model for the tests of the guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from guarding import PARAMS
from harness import random_detoxifier
from tiny import make_tiny_backbone
from waiting import wait_until

from detox_guard import DetoxiGen, SteeringStream

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def tiny() -> Iterator[DetoxiGen]:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    with DetoxiGen(backbone, [SteeringStream(random_detoxifier(backbone))], params=PARAMS) as model:
        yield model
        wait_until(lambda: model.stats().seats == 0)
        stats = model.stats()
        assert (stats.tokens_steered, stats.rows, stats.queued) == (stats.steps_steered, 0, 0)
