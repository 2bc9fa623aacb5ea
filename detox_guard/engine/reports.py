"""How a request ends: its sink is told, and it is counted. Knows sinks and errors; knows no rows, no threads."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

from detox_guard.errors import DetoxGuardError, RequestCancelledError, StepError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from detox_guard.engine.base import EngineStats, Finish, Request

__all__ = ["Reports", "as_exception", "as_step_error"]

_log = logging.getLogger("detox_guard.engine")


class Reports:
    """Tells sinks how their requests ended. A sink that raises here cannot hurt anyone else."""

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def finished(self, request: Request, reason: Finish) -> None:
        self._stats.finished += 1
        try:
            request.sink.on_finish(reason)
        except BaseException:
            self._log_sink()

    def failed(self, request: Request, error: Exception) -> None:
        cancelled = isinstance(error, RequestCancelledError)
        self._stats.cancelled += cancelled
        self._stats.failed += not cancelled
        try:
            request.sink.on_error(error)
        except BaseException:
            self._log_sink()

    def cancelled(self, request: Request) -> None:
        self.failed(request, RequestCancelledError("the request was cancelled"))

    def all_failed(self, requests: Iterable[Request], error: DetoxGuardError) -> None:
        """Each gets a copy of its own: what is raised in several threads would collect the tracebacks of them all."""
        for request in requests:
            twin = copy.copy(error)
            twin.__cause__ = error.__cause__
            self.failed(request, twin)

    def _log_sink(self) -> None:
        _log.exception("a sink raised while it was told how its request ended")


def as_exception(error: BaseException) -> Exception:
    """What ends a thread or a task (`SystemExit`, a panic in native code) must not end the engine's: it is an error."""
    return error if isinstance(error, Exception) else as_step_error(error)


def as_step_error(error: BaseException) -> DetoxGuardError:
    if isinstance(error, DetoxGuardError):
        return error
    step = StepError(f"a decoding step failed: {type(error).__name__}: {error}", hint="this is a bug, or out of memory")
    step.__cause__ = error
    return step
