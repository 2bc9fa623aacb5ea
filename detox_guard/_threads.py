"""Running work on a thread of its own. Knows why that is faster, and that a thread may not be had; knows no model."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from detox_guard.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

__all__ = ["run_aside", "run_off_loop", "start_thread"]

T = TypeVar("T")


def start_thread(target: Callable[[], object], name: str) -> threading.Thread:
    """A daemon thread that runs. Raises `EngineError` (retryable) where the machine gives no more threads."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        raise _no_thread(name, error) from error
    return thread


def run_aside(work: Callable[[], T]) -> T:
    """The result of `work`, run on a thread that then ends; what it raises is raised here.

    Each thread that computes with torch on a CPU gets an OpenMP team of its own, which lives as long as the thread.
    Where there are more such teams than cores, waiting at a barrier falls from spinning to sleeping, and decoding (many
    small operations) takes up to 1.6 times as long. So loading, on the caller's thread, must not leave a team behind.
    Raises `EngineError` where there is no thread to be had.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    start_thread(run, "detox-guard-loading").join()
    try:
        if errors:
            raise errors[0]
        return results[0]
    finally:
        errors.clear()  # with its frames, and what they hold


async def run_off_loop(work: Callable[..., T], *args: Any, pool: Executor | None = None) -> T:
    """The result of `work(*args)`, computed on a thread of `pool` (None: the loop's own), in this context.

    Raises `EngineError` where there is no thread to be had.
    """
    call = functools.partial(contextvars.copy_context().run, work, *args)
    try:
        future = asyncio.get_running_loop().run_in_executor(pool, call)
    except (RuntimeError, MemoryError) as error:
        raise _no_thread("a pool's", error) from error
    return await future


def _no_thread(name: str, error: BaseException) -> EngineError:
    found = EngineError(f"thread {name!r} cannot start: {error}", hint="fewer threads, or a higher limit (ulimit -u)")
    found.retryable = True
    return found
