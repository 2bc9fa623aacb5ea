"""What breaks behind and before a server with a real engine: each a clear answer, and the rest is served."""

from __future__ import annotations

import json
import select
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serving import chat, client_of, events, listening, served, text_of
from waiting import wait_until

from detox_guard import GuardPolicy, InvalidParamsError
from detox_guard.server import ServerConfig, create_app
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import httpx

    from detox_guard import DetoxiGen

PLAIN = ServerConfig(guard=None)
ASKED: dict[str, Any] = {"max_tokens": 12, "seed": 4}


class Failing:
    """A scorer that does `what` from the call on that is told."""

    name = "failing"

    def __init__(self, what: Callable[[], object], since: int) -> None:
        self.what, self.since, self.calls = what, since, 0

    def score(self, texts: Sequence[str]) -> list[float]:
        self.calls += 1
        if self.calls >= self.since:
            self.what()
        return [0.1] * len(texts)


def died() -> None:
    raise RuntimeError("/home/me/secret")


def error_of(response: httpx.Response) -> tuple[int, str]:
    assert "secret" not in response.text
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("since", [1, 2])
def test_a_scorer_that_dies_releases_nothing_more_and_the_rest_is_served(model: DetoxiGen, since: int) -> None:
    scorer = Failing(died, since)
    with served(model, ServerConfig(guard=GuardPolicy(scorer=scorer, unit=3), allow_unguarded=True)) as client:
        response = chat(client, stream=True, **ASKED)
        scorer.calls = 0
        assert error_of(chat(client, **ASKED)) == (503, "scorer_failed")
        assert chat(client, detox={"guard": False}, **ASKED).status_code == 200
        scorer.since = 10**9
        fine = chat(client, **ASKED).json()["choices"][0]
    assert fine["detox"]["guard"] == "failing"
    if since == 1:
        assert error_of(response) == (503, "scorer_failed")
        return
    told = events(response)
    assert told[-1]["error"]["code"] == "scorer_failed"
    assert text_of(told) != ""
    assert fine["message"]["content"].startswith(text_of(told))


def test_a_scorer_that_does_not_answer_is_given_up(model: DetoxiGen) -> None:
    gate = threading.Event()
    policy = GuardPolicy(scorer=Failing(lambda: gate.wait(60), 1), scorer_timeout_s=0.05)
    with served(model, ServerConfig(guard=policy, allow_unguarded=True)) as client:
        assert error_of(chat(client, **ASKED)) == (503, "scorer_failed")
        assert chat(client, detox={"guard": False}, **ASKED).status_code == 200
        gate.set()


def test_a_step_that_fails_is_told_and_the_next_request_is_served(model: DetoxiGen) -> None:
    broken, steps = threading.Event(), []

    def step(*_: Any) -> None:
        steps.append(1)
        if broken.is_set() and len(steps) > 4:
            died()

    hook = model.backbone.model.lm_head.register_forward_pre_hook(step)
    with served(model, PLAIN) as client, ThreadPoolExecutor() as pool:
        expected = chat(client, **ASKED).json()["choices"][0]["message"]["content"]
        steps.clear()
        broken.set()
        asked = [pool.submit(chat, client, stream=stream, **ASKED) for stream in (True, False, False)]
        streamed, *whole = [one.result() for one in asked]
        broken.clear()
        assert chat(client, **ASKED).json()["choices"][0]["message"]["content"] == expected
    hook.remove()
    assert [error_of(one) for one in whole] == [(500, "engine_failed")] * 2
    if streamed.status_code == 200:
        assert events(streamed)[-1]["error"]["code"] == "engine_failed"
    else:
        assert error_of(streamed) == (500, "engine_failed")


def test_a_full_disk_under_the_audit_log_hurts_no_reply(model: DetoxiGen, caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    said = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=12, seed=4).text
    policy = GuardPolicy(scorer=ScriptedScorer(said[2:6]), max_rewinds=0, audit_log="/dev/full")
    with served(model, ServerConfig(guard=policy)) as client:
        told = [chat(client, **ASKED).json()["choices"][0] for _ in range(2)]
    assert [one["finish_reason"] for one in told] == ["content_filter"] * 2
    assert [one["message"]["content"] for one in told] == ["[removed]"] * 2
    assert caplog.text.count("No space left") == 2
    assert said[2:6] not in caplog.text


def test_an_audit_log_that_is_gone_is_no_path_in_an_answer(model: DetoxiGen, tmp_path: Path) -> None:
    folder = tmp_path / "secret"
    policy = GuardPolicy(audit_log=str(folder / "log.jsonl"))
    with pytest.raises(InvalidParamsError, match="audit_log"):
        create_app(model, ServerConfig(guard=policy))
    folder.mkdir()
    with served(model, ServerConfig(guard=policy, allow_unguarded=True)) as client:
        assert chat(client, **ASKED).status_code == 200
        (folder / "log.jsonl").unlink()
        folder.rmdir()
        assert error_of(chat(client, **ASKED)) == (503, "audit_log_failed")
        assert chat(client, detox={"guard": False}, **ASKED).status_code == 200


def test_requests_that_are_slow_to_arrive_take_nobodys_place() -> None:
    config = PLAIN.replace(max_requests=2, body_timeout_s=60.0)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n{"
    with listening(create_app(ScriptedDetoxiGen(), config)) as url, client_of(url) as client:
        port = int(url.rpartition(":")[2])
        lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for line in lines:
            line.sendall(head)
        assert chat(client).status_code == 200
        assert "detox_guard_requests_under_way 0.0" in client.get("/metrics").text
        for line in lines:
            line.close()


def test_bodies_on_their_way_have_a_bound_together() -> None:
    config = PLAIN.replace(max_body_bytes=1024, body_timeout_s=60.0)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1024\r\n\r\n"
    with listening(create_app(ScriptedDetoxiGen(), config)) as url, client_of(url) as client:
        port = int(url.rpartition(":")[2])
        lines = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(65)]
        for line in lines:
            line.sendall(head + b"x" * 1023)
        (refused, *_), _, _ = select.select(lines, [], [], 30)
        assert refused.recv(1000).startswith(b"HTTP/1.1 429")
        for line in lines:
            line.close()
        wait_until(lambda: chat(client).status_code == 200)


def test_a_body_of_50_megabytes_is_refused_at_once_and_the_rest_is_served() -> None:
    def pieces() -> Any:
        for _ in range(50):
            yield b"x" * 1_000_000

    with served(ScriptedDetoxiGen(), PLAIN) as client:
        assert error_of(client.post("/v1/chat/completions", content=b"x" * 50_000_000)) == (413, "too_large")
        assert error_of(client.post("/v1/chat/completions", content=pieces())) == (413, "too_large")
        assert chat(client).status_code == 200
        assert json.loads(client.get("/health").text) == {"status": "ok"}
