"""Tells the outside what a guard did: the policy's hook, and its log of JSON lines. Knows no reply and no engine."""

from __future__ import annotations

import functools
import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING

from detox_guard.errors import InvalidParamsError

if TYPE_CHECKING:
    from detox_guard.policy import GuardPolicy
    from detox_guard.trace import Intervention

__all__ = ["audit_log", "report"]

_log = logging.getLogger("detox_guard.guard")
_MAX_BYTES, _KEPT_FILES = 10_000_000, 5


def report(policy: GuardPolicy, event: Intervention, seed: int | None) -> None:
    """Hand `event` to the policy's hook and log. What fails there is logged and does not hurt the reply."""
    if policy.on_event is not None:
        try:
            policy.on_event(event)
        except Exception:
            _log.exception("on_event raised")
    if policy.audit_log is not None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "seed": seed, **event.to_dict()}
        record = logging.LogRecord("audit", logging.INFO, "", 0, json.dumps(line, ensure_ascii=False), None, None)
        audit_log(policy.audit_log).handle(record)


@functools.cache
def audit_log(path: str) -> RotatingFileHandler:
    """The one handler of this file in this process. Raises `InvalidParamsError` where it cannot be written.

    Rotation is the standard library's, which is not made for several processes writing one file.
    """
    try:
        return RotatingFileHandler(path, maxBytes=_MAX_BYTES, backupCount=_KEPT_FILES, encoding="utf-8")
    except OSError as error:
        raise InvalidParamsError("audit_log", path, f"a file that can be written: {error}") from error
