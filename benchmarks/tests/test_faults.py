"""`detox-guard serve` under load: killed and started again, told to stop, and beset by a thousand half-open clients."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from commands import start
from detox_benchmarks.serving.client import Line
from waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import Popen

BODY: dict[str, Any] = {"prompt": "The quick brown fox", "max_tokens": 30, "detox": {"guard": {"unit": 4}}}


class Clients:
    """Some that ask again and again until the server is gone, in a thread; `seen` counts what they met."""

    def __init__(self, port: int, count: int) -> None:
        self._port, self._count = port, count
        self.seen: Counter[str] = Counter()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Clients:
        self._thread.start()
        wait_until(lambda: self.seen["200"] > self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server is not gone"

    async def _run(self) -> None:
        await asyncio.gather(*(self._one(i % 2 == 0) for i in range(self._count)))

    async def _one(self, stream: bool) -> None:
        line = Line(self._port)
        while True:
            try:
                status = await line.post("/v1/completions", {**BODY, "stream": stream})
            except (OSError, EOFError):  # nothing of an answer came: whoever asks knows that it was not answered
                self.seen["refused"] += 1
                line.hang_up()
                return
            try:
                said = await line.whole()
            except (OSError, EOFError):
                self.seen["broke off"] += 1
                line.hang_up()
                return
            if stream and status == 200 and not said.endswith(b"data: [DONE]\n\n"):
                self.seen["silent cut"] += 1
            elif b'"error"' in said:
                told = json.loads(said.split(b"data: ")[-2] if stream and status == 200 else said)
                self.seen[told["error"]["code"]] += 1
            else:
                self.seen[str(status)] += 1


@contextmanager
def serving(folder: Path, detoxifier: Path, *more: str, port: int = 0, **how: Any) -> Iterator[tuple[Popen[str], int]]:
    process = start(
        "serve", "--model", folder, "--detoxifier", detoxifier, "--device", "cpu", "--port", str(port), *more, **how
    )
    try:
        for line in process.stderr or ():
            if line.startswith("Serving at "):
                break
        else:
            raise AssertionError(process.wait())
        drained = threading.Thread(target=lambda: list(process.stderr or ()), daemon=True)  # a full pipe would halt it
        drained.start()
        yield process, int(line.split()[2].rpartition(":")[2])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        drained.join(30)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def answers(port: int) -> int:
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=60, trust_env=False).status_code


def test_killed_under_load_and_started_again(tiny_folder: Path, detoxifier_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    more = ("--audit-log", str(log), "--guard-threshold", "0.02")
    with serving(tiny_folder, detoxifier_folder, *more) as (process, port):
        with Clients(port, 8) as clients:
            process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert set(clients.seen) <= {"200", "refused", "broke off"}
    assert clients.seen["refused"] + clients.seen["broke off"] == 8
    with serving(tiny_folder, detoxifier_folder, *more, port=port) as (_, again):
        assert again == port
        assert answers(port) == 200
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_told_to_stop_under_load_every_answer_comes_to_an_end(tiny_folder: Path, detoxifier_folder: Path) -> None:
    with serving(tiny_folder, detoxifier_folder) as (process, port):
        with Clients(port, 8) as clients:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    assert set(clients.seen) <= {"200", "refused", "unavailable"}
    assert clients.seen["refused"] == 8


def test_a_thousand_half_open_clients_are_let_go_and_the_rest_is_served(
    tiny_folder: Path, detoxifier_folder: Path
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("too few open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = json.dumps({**BODY, "stream": True}).encode()
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    begun = [b"", head[:40], head + b"Content-Length: 900\r\n\r\n{", whole]  # the last one reads nothing

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))

    with serving(tiny_folder, detoxifier_folder, "--body-timeout-s", "8", preexec_fn=few_files) as (process, port):
        server = psutil.Process(process.pid)
        assert answers(port) == 200
        before = server.num_fds()
        lines = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(1000)]
        for i, line in enumerate(lines):
            line.sendall(begun[i % 4])
        wait_until(lambda: server.num_fds() >= before + 500)
        wait_until(lambda: answers(port) == 200)  # the whole ones among them are answered, or refused, first
        answered = Counter(read(line) for line in lines)
        for line in lines:
            line.close()
        wait_until(lambda: server.num_fds() <= before + 2)
        assert answers(port) == 200
    assert set(answered) <= {"", "200", "408", "429"}
    assert answered[""] == 500
    assert answered["408"] > 0
    assert answered["200"] > 0


def read(line: socket.socket) -> str:
    """The status that the server told before it let go; "" for none."""
    said = b""
    while piece := line.recv(65536):
        said += piece
    return said[9:12].decode()
