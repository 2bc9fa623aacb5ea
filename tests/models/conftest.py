"""A tiny model in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from saved import save
from tiny import make_tiny_config, make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama on disk."""
    return save(tmp_path / "tiny-llama", make_tiny_model(make_tiny_config("llama")))
