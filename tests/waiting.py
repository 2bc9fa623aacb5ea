"""Waiting for what another thread brings about."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["WAIT_S", "await_until", "wait_until"]

WAIT_S = 60.0
"""Longer than anything takes here, even where others use the machine."""


def wait_until(condition: Callable[[], object]) -> None:
    """Return once it holds. Fails where it never does."""
    for pause_s in _pauses(condition):
        time.sleep(pause_s)


async def await_until(condition: Callable[[], object]) -> None:
    """`wait_until`, while the event loop goes on."""
    for pause_s in _pauses(condition):
        await asyncio.sleep(pause_s)


def _pauses(condition: Callable[[], object]) -> Iterator[float]:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        yield 0.002
