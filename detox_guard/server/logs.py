"""One JSON line a request, on Python's logging. Knows what may be told of a request; is given no text of it unless
asked."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

__all__ = ["JsonLines", "access", "log_to_stderr"]

access = logging.getLogger("detox_guard.server.access")


class JsonLines(logging.Formatter):
    """Everything as one line of JSON; `extra={"told": {…}}` puts its fields in. Stacks are left out but their kinds."""

    def format(self, record: logging.LogRecord) -> str:
        """ASCII alone, so that no text begins a line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
        return json.dumps({**line, **getattr(record, "told", {})}, default=str)


def log_to_stderr(level: str = "INFO") -> None:
    """The server's own log, and uvicorn's, as JSON lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("detox_guard", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
