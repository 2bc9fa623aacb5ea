"""Waiting for what another thread brings about."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WAIT_S", "wait_until"]

WAIT_S = 60.0
"""Longer than anything takes here, even where others use the machine."""


def wait_until(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    """Return once it holds. Fails where it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)
