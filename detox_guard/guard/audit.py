"""Tells the outside what a guard did: the policy's hook, and its log of JSON lines. Knows no reply and no engine."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

from detox_guard._forking import in_children
from detox_guard.errors import InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import TextIOWrapper

    from detox_guard.results import Intervention
    from detox_guard.settings import GuardPolicy

__all__ = ["AuditLog", "audit_log", "call_hook", "check_log", "report_intervention"]

_log = logging.getLogger("detox_guard.guard")
_MAX_BYTES, _KEPT_FILES = 10_000_000, 5
MOST_LOGS = 256
"""Logs that are remembered; one that was forgotten is opened anew."""


def report_intervention(policy: GuardPolicy, event: Intervention, seed: int | None) -> None:
    """Hand `event` to the policy's hook and log. What fails there is logged and does not hurt the reply."""
    if policy.on_event is not None:
        call_hook(policy.on_event, event)
    if policy.audit_log is not None:
        # Everything but ASCII is escaped: no text of a model's begins a line, however a reader splits lines.
        line = json.dumps(
            {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "seed": seed, **event.to_dict()}
        )
        try:
            audit_log(policy.audit_log).handle(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))
        except Exception as error:
            _tell(policy.audit_log, error, line)


def call_hook(hook: Callable[[Intervention], object], event: Intervention) -> None:
    """What it raises is logged, no more."""
    try:
        hook(event)
    except Exception:
        _log.exception("on_event raised")


class AuditLog(RotatingFileHandler):
    """One file of lines. It is open only while a line is written, so any number of logs costs no open files.

    Rotation is the standard library's, which is not made for several processes writing one file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, maxBytes=_MAX_BYTES, backupCount=_KEPT_FILES, encoding="utf-8", delay=True)
        self._failed: BaseException | None = None
        self._size = 0
        """Bytes of the file before the line."""

    def check(self) -> None:
        """Raises `OSError` where it cannot be written."""
        self.acquire()
        try:
            self._open().close()
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        """Append the line whole, or tell that it could not be: on a full disk, say."""
        self._failed = None
        super().emit(record)
        stream, self.stream = self.stream, None
        try:
            if stream is not None:
                stream.close()
        except OSError as error:
            self._failed = self._failed or error
        if self._failed is not None:
            with suppress(OSError):  # half a line would spoil the next one
                os.truncate(self.baseFilename, self._size)
            _tell(self.baseFilename, self._failed, record.getMessage())

    def handleError(self, record: logging.LogRecord) -> None:
        """Called where a line could not be written."""
        self._failed = sys.exception()

    def _open(self) -> TextIOWrapper:
        with suppress(FileNotFoundError):
            kind = Path(self.baseFilename).stat().st_mode
            if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):  # opening it would wait for a reader
                raise OSError("it is a pipe")
        stream = super()._open()
        self._size = os.fstat(stream.fileno()).st_size
        return stream


_logs: dict[str, AuditLog] = {}
_logs_lock = threading.Lock()


def audit_log(path: str) -> AuditLog:
    """The one handler of this file in this process, however its path is spelt."""
    real = os.path.realpath(Path(path).expanduser())
    with _logs_lock:
        if real not in _logs:
            if len(_logs) >= MOST_LOGS:
                _logs.pop(next(iter(_logs)))
            _logs[real] = AuditLog(real)
        return _logs[real]


def check_log(path: str) -> None:
    """Raises `InvalidParamsError` where it cannot be written."""
    try:
        audit_log(path).check()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidParamsError("audit_log", path, f"a file that can be written: {error}") from error


def _tell(path: str, error: BaseException, line: str) -> None:
    """The line that the log did not take goes to Python's logging instead."""
    _log.error("audit log %r cannot be written (%s: %s): %s", path, type(error).__name__, error, line)


def _forget() -> None:
    """A forked child has no say over its parent's locks."""
    global _logs_lock
    _logs_lock = threading.Lock()


in_children(_forget)
