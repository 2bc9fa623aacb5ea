"""The server of a measurement: a process of its own, as `detox-guard serve` is one, with a scorer that writes down what
it passed, or with a scripted model. `started` starts one; run as a program, this file is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Started", "started"]

_READY = "Serving at "


class Started:
    """A server that answers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        for line in process.stdout or ():
            if line.startswith(_READY):
                self.port = int(line.rpartition(":")[2])
                return
        raise RuntimeError(f"the server ended with {process.wait()}")


@contextmanager
def started(**how: Any) -> Iterator[Started]:
    """A server as `_serve` takes it. It is told to stop at the end, and killed if it does not."""
    command = [sys.executable, "-m", __name__, json.dumps(how)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield Started(process)
        process.terminate()
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _serve(
    model: str | None = None,
    detoxifier: str = "auto",
    marks: str | None = None,
    scripted: bool = False,
    engine: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
) -> None:
    """`marks`: where the scorer writes what it passed. `scripted`: a model that answers at once, and no guard."""
    from detox_benchmarks.serving.marks import Marker
    from detox_guard import DetoxiGen, EngineConfig, GuardPolicy
    from detox_guard.server import ServerConfig
    from detox_guard.server.logs import log_to_stderr
    from detox_guard.server.run import Server
    from detox_guard.testing import ScriptedDetoxiGen

    guard = None if marks is None else GuardPolicy(scorer=Marker(marks))
    config = ServerConfig(port=0, guard=guard, **(server or {}))
    loaded: Any
    if scripted:
        loaded = ScriptedDetoxiGen()
    else:
        bounds = EngineConfig(**{"when_full": "refuse", **(engine or {})})
        loaded = DetoxiGen.from_pretrained(model, detoxifier=detoxifier, config=bounds)
    log_to_stderr()
    Server({"model": loaded}, config, on_ready=lambda url: print(_READY + url, flush=True)).run()


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
