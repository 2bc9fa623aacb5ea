"""Running `detox-guard` in tests: in this process, or as one of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner, Result

from detox_guard.cli import app

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DEVICE", "PROMPT", "rows", "run", "start"]

PROMPT = "The quick brown fox"
DEVICE = ("--device", "cpu", "--dtype", "float32")


def run(*words: str | Path, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def start(*words: str | Path, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from detox_guard.cli import main; main()", *map(str, words)]
    settings = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        # A shell starts what runs in the background deaf to Ctrl-C, and the children inherit that.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    return subprocess.Popen(command, **{**settings, "text": True, "encoding": "utf-8", **kwargs})
