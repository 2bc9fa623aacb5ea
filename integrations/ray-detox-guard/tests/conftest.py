"""One tiny model in a folder and one cluster of two nodes for all tests that ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from small import nodes, save_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    with nodes(2) as address:
        yield address
