"""What stands before the routes: keys, bounds, names, headers, hanging up."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import CHAT, chat, client_of, events, listening, served
from waiting import wait_until

from detox_guard.server import ServerConfig, create_app
from detox_guard.server.keys import Keys, new_key
from detox_guard.server.logs import JsonLines
from detox_guard.testing import ScriptedDetoxiGen

PLAIN = ServerConfig(guard=None)
KEY, LINE = new_key("ann")
KEYS = Keys({LINE.split(":")[1]: "ann"})


def test_every_route_but_probes_and_the_page_needs_a_key() -> None:
    with served(ScriptedDetoxiGen(), PLAIN, keys=KEYS) as client:
        open_to_all = {path: client.get(path).status_code for path in ("/health", "/ready", "/", "/playground.js")}
        closed = [client.get(path) for path in ("/metrics", "/openapi.json", "/v1/models", "/v1/models/x", "/nothing")]
        closed.append(chat(client))
        wrong = client.get("/v1/models", headers={"Authorization": f"Bearer {KEY[:-1]}"})
        right = client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert open_to_all == dict.fromkeys(open_to_all, 200)
    assert [one.status_code for one in [*closed, wrong]] == [401] * 7
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    assert KEY[:-1] not in wrong.text
    assert right.status_code == 200


def test_a_body_that_is_too_long_is_refused_however_it_comes() -> None:
    config = PLAIN.replace(max_body_bytes=2048)
    with served(ScriptedDetoxiGen(), config) as client:
        told = chat(client, user="x" * 3000)
        pieces = client.post("/v1/chat/completions", content=iter([b"x" * 1500] * 2))
        fits = chat(client)
    for refused in (told, pieces):
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "too_large"
    assert fits.status_code == 200


def test_a_body_that_does_not_arrive_is_refused() -> None:
    with listening(create_app(ScriptedDetoxiGen(), PLAIN.replace(body_timeout_s=0.05))) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            assert line.recv(100).startswith(b"HTTP/1.1 408")


def test_deep_json_and_odd_json_are_refused_as_such() -> None:
    with served(ScriptedDetoxiGen(), PLAIN) as client:
        for body in (b"[" * 100_000, b'{"messages": ' + b'{"a":' * 20_000, b"\xff\xfe", b'"text"', b"NaN"):
            response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            assert response.status_code == 400, body[:20]
        deep: Any = "x"
        for _ in range(300):
            deep = [deep]
        assert chat(client, tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}]).is_client_error
        assert client.get("/health").status_code == 200


def test_more_requests_than_are_taken_are_told_to_come_back() -> None:
    model = ScriptedDetoxiGen()
    app = create_app(model, PLAIN.replace(max_requests=2, max_requests_per_key=1), keys=KEYS)
    other, line = new_key("bob")
    app.state.detox_guard.keys = Keys({LINE.split(":")[1]: "ann", line.split(":")[1]: "bob"})
    with listening(app) as url, ThreadPoolExecutor() as pool:
        ann, bob = (client_of(url, Authorization=f"Bearer {key}") for key in (KEY, other))
        with ann, bob:
            with model.hold():
                first = pool.submit(chat, ann)
                model.wait_for(1)
                same_key = chat(ann)
                second = pool.submit(chat, bob)
                model.wait_for(2)
                full = chat(bob)
            assert [first.result().status_code, second.result().status_code] == [200, 200]
            assert chat(ann).status_code == 200
    for refused in (same_key, full):
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [True, False])
async def test_hanging_up_frees_the_seat(stream: bool) -> None:
    model = ScriptedDetoxiGen()
    with listening(create_app(model, PLAIN)) as url:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            with model.hold():
                task = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": stream, "n": 2}))
                await asyncio.to_thread(model.wait_for, 2)
                task.cancel()
                await asyncio.to_thread(model.wait_for, 0)
    assert model.abandoned == 2


def test_a_reader_that_takes_nothing_is_let_go() -> None:
    model = ScriptedDetoxiGen(["word " * 60_000])
    app = create_app(model, PLAIN.replace(write_timeout_s=0.2, max_tokens=131_072))
    with listening(app) as url:
        port = int(url.rpartition(":")[2])
        body = json.dumps({**CHAT, "stream": True, "max_tokens": 131_072}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with client_of(url) as client, socket.create_connection(("127.0.0.1", port), timeout=30) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.sendall(head.encode() + body)
            model.wait_for(1)
            model.wait_for(0)
            wait_until(lambda: "detox_guard_requests_under_way 0.0" in client.get("/metrics").text)


def test_other_sites_and_other_names_are_refused() -> None:
    with served(ScriptedDetoxiGen(), PLAIN.replace(cors_origins=("https://chat.example.org",))) as client:
        own = str(client.base_url).rstrip("/")
        found = {
            origin: client.post("/v1/chat/completions", json=CHAT, headers={"Origin": origin}).status_code
            for origin in (own, "https://chat.example.org", "https://evil.example.org", "null")
        }
        rebound = client.get("/v1/models", headers={"Host": "evil.example.org"})
        preflight = client.options(
            "/v1/models", headers={"Origin": "https://evil.example.org", "Access-Control-Request-Method": "POST"}
        )
        no_json = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    assert found == {own: 200, "https://chat.example.org": 200, "https://evil.example.org": 403, "null": 403}
    assert rebound.status_code == 421
    assert "access-control-allow-origin" not in preflight.headers
    assert no_json.status_code == 400


def test_every_answer_has_the_headers_that_keep_browsers_careful() -> None:
    with served(ScriptedDetoxiGen(), PLAIN) as client:
        page, models = client.get("/"), client.get("/v1/models", headers={"X-Request-ID": "mine-1"})
        odd = client.get("/v1/models", headers={"X-Request-ID": "a b\t<c>"})
    for response in (page, models):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "server" not in response.headers or "uvicorn" in response.headers["server"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert models.headers["x-request-id"] == "mine-1"
    assert odd.headers["x-request-id"] not in ("", "a b\t<c>")


def test_the_log_has_a_line_a_request_and_no_text_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    def lines(config: ServerConfig) -> list[dict[str, Any]]:
        caplog.clear()
        model = ScriptedDetoxiGen(["The fox is secret."])
        with caplog.at_level(logging.INFO, logger="detox_guard"), served(model, config) as client:
            chat(client, messages=[{"role": "user", "content": "My secret"}])
            events(chat(client, stream=True))
            chat(client, messages=[{"role": "user", "secret": 1}], colour="secret")
        told = [JsonLines().format(one) for one in caplog.records if one.name.startswith("detox_guard")]
        return [json.loads(line) for line in told]

    quiet, full = lines(PLAIN), lines(PLAIN.replace(log_text=True))
    assert [(one["route"], one["status"], one["level"]) for one in quiet] == [
        ("/v1/chat/completions", status, "info") for status in (200, 200, 400)
    ]
    assert quiet[1]["usage"]["completion_tokens"] == 4
    assert quiet[1]["ended"] == ["stop"]
    assert "secret" not in str(quiet)
    assert full[0]["replies"] == ["The fox is secret."]


def test_figures_are_there_for_prometheus() -> None:
    with served(ScriptedDetoxiGen(["One two three."]), PLAIN) as client:
        chat(client)
        chat(client, colour="blue")
        text = client.get("/metrics").text
    assert 'detox_guard_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'detox_guard_requests_total{route="/v1/chat/completions",status="400"} 1.0' in text
    assert 'detox_guard_tokens_total{kind="steered",model="scripted/words"} 3.0' in text
    assert 'detox_guard_replies_total{model="scripted/words",reason="stop"} 1.0' in text
    assert 'detox_guard_first_text_seconds_count{model="scripted/words"} 1.0' in text
    assert 'detox_guard_between_text_seconds_count{model="scripted/words"} 2.0' in text
    assert 'detox_guard_steering_nats_count{model="scripted/words"} 1.0' in text
    assert "detox_guard_requests_under_way 0.0" in text
