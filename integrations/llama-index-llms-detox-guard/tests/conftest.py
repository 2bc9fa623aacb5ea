"""Keeps LlamaIndex's global settings from leaking between tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from llama_index.core import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    before = dict(vars(Settings))
    yield
    vars(Settings).clear()
    vars(Settings).update(before)
