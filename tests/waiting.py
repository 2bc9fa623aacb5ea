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


def wait_until(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    """Return once it holds. Fails where it does not within `seconds`."""
    for pause_s in _pauses(condition, seconds):
        time.sleep(pause_s)


async def await_until(condition: Callable[[], object]) -> None:
    """`wait_until`, while the event loop goes on."""
    for pause_s in _pauses(condition, WAIT_S):
        await asyncio.sleep(pause_s)


def _pauses(condition: Callable[[], object], seconds: float) -> Iterator[float]:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        yield 0.002
