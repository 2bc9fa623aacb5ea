"""The engine's tests run over every runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kits import KITS, kit_of

if TYPE_CHECKING:
    from pathlib import Path

    from kits import Kit


@pytest.fixture(params=list(KITS))
def kit(request: Any) -> Kit:
    return kit_of(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a module's GGUF files."""
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture
def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out about a file is kept beside it."""
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(folder / "cache"))
