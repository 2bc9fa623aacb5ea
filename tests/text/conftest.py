"""A tiny model for the tests of grammars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import random_detoxifier
from tiny import make_tiny_backbone

from detox_guard import DetoxiGen
from detox_guard.detoxifiers.soft_prompt import SteeringStream

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def model() -> Iterator[DetoxiGen]:
    backbone = make_tiny_backbone("llama")
    with DetoxiGen(backbone, [SteeringStream(random_detoxifier(backbone), -1.0)]) as model:
        yield model
