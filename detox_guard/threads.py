"""Running work on a thread of its own. Knows why that is faster; knows no model."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_aside"]

T = TypeVar("T")


def run_aside(work: Callable[[], T]) -> T:
    """The result of `work`, run on a thread that then ends; what it raises is raised here.

    Each thread that computes with torch on a CPU gets an OpenMP team of its own, which lives as long as the thread.
    Where there are more such teams than cores, waiting at a barrier falls from spinning to sleeping, and decoding (many
    small operations) takes up to 1.6 times as long. So loading, on the caller's thread, must not leave a team behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="detox-guard-loading", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
