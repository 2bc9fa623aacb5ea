"""`detox-guard serve` as a process: its signals, its end, its refusals; and the server with tiny and default models."""

from __future__ import annotations

import gc
import json
import math
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from commands import run, start
from serving import chat, client_of, events, served, text_of
from tiny import make_tiny_backbone
from waiting import wait_until

from detox_guard import DetoxiGen, GuardPolicy
from detox_guard.server import ServerConfig
from detox_guard.server.run import Server
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = {"prompt": "The quick brown fox", "max_tokens": 8, "seed": 3}


def address(process: Any) -> str:
    for line in process.stderr:
        if line.startswith("Serving at "):
            return str(line.split()[2])
    raise AssertionError(process.wait())


def test_a_model_is_served_read_anew_and_drained(tiny_folder: Path, detoxifier_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"

    def write(*names: str, threshold: float) -> None:
        head = f"[server]\nport = 0\n[server.guard]\nthreshold = {threshold}\n"
        loading = 'loading = { device = "cpu", dtype = "float32" }'
        one = f'model = "{tiny_folder}"\ndetoxifier = "{detoxifier_folder}"\n{loading}\n'
        config.write_text(head + "".join(f"[models.{name}]\n{one}" for name in names))

    write("a", threshold=0.4)
    process = start("serve", "--config", config)
    try:
        url = address(process)
        with client_of(url) as client, ThreadPoolExecutor() as pool:
            told = client.get("/v1/models").json()
            assert ([one["id"] for one in told["data"]], told["detox"]["guard_threshold"]) == (["a"], 0.4)
            text = client.post("/v1/completions", json=PROMPT).json()["choices"][0]["text"]
            assert text
            running = pool.submit(client.post, "/v1/completions", json={**PROMPT, "max_tokens": 300, "n": 4})
            write("b", "a", threshold=0.3)
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
            assert client.get("/v1/models").json()["detox"]["guard_threshold"] == 0.3
            assert client.post("/v1/completions", json={**PROMPT, "model": "a"}).json()["choices"][0]["text"] == text
            config.write_text("[server")
            process.send_signal(signal.SIGHUP)
            assert running.result().status_code == 200
            late = pool.submit(client.post, "/v1/completions", json={**PROMPT, "max_tokens": 200, "stream": True})
            wait_until(lambda: "detox_guard_requests_under_way 1.0" in client.get("/metrics").text or late.done())
            process.send_signal(signal.SIGTERM)
            said = events(late.result())
            assert said[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    finally:
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert "the configuration was not read again" in log
    assert all(json.loads(line) for line in log.splitlines() if line.startswith("{"))


def test_an_open_address_without_keys_is_refused(tiny_folder: Path) -> None:
    args = ("serve", "--model", tiny_folder, "--alpha", "0", "--device", "cpu", "--port", "0", "--host", "0.0.0.0")
    result = run(*args)
    assert result.exit_code == 2
    assert "no API keys" in result.stderr


def test_a_key_is_made_and_its_hash_kept(tmp_path: Path) -> None:
    result = run("key", "ann", "--file", tmp_path / "keys.txt")
    kept = (tmp_path / "keys.txt").read_text()
    assert kept.startswith("ann sha256:")
    assert result.stdout.strip() not in kept


def test_replies_that_do_not_end_in_time_end_with_an_error() -> None:
    model = ScriptedDetoxiGen(["One two three."])
    server = Server({"a": model}, ServerConfig(port=0, drain_s=0.05, guard=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    wait_until(lambda: gc.get_freeze_count() > 0)
    with client_of(server.url) as client, ThreadPoolExecutor() as pool, model.hold():
        asked = [pool.submit(chat, client, stream=stream) for stream in (True, False)]
        model.wait_for(2)
        server.should_exit = True
        refused = [one.result() for one in asked]
    thread.join(30)
    assert gc.get_freeze_count() == 0
    assert [one.status_code for one in refused] == [503, 503]
    assert [one.json()["error"]["code"] for one in refused] == ["unavailable"] * 2
    assert model.closed


def test_a_request_whose_head_does_not_arrive_is_let_go() -> None:
    server = Server({"a": ScriptedDetoxiGen()}, ServerConfig(port=0, body_timeout_s=0.05))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert line.recv(10) == b""
    with client_of(server.url) as client:
        large = client.get("/health", headers={"X-Large": "x" * 1_000_000})
        assert large.status_code == 400
        assert client.post("/v1/completions", content=b"x" * 50_000_000).status_code == 413
        assert client.get("/health").status_code == 200
    server.should_exit = True
    thread.join(30)


def test_a_real_models_stream_is_its_text_and_its_log_probabilities_are_the_steered(model: DetoxiGen) -> None:
    with served(model, ServerConfig(guard=None)) as client:
        asked = {"max_tokens": 10, "seed": 4, "logprobs": True, "detox": {"trace": True}}
        whole = chat(client, **asked).json()["choices"][0]
        told = events(chat(client, stream=True, **asked))
        plain = client.post("/v1/completions", json={**PROMPT, "logprobs": 0}).json()["choices"][0]
    reply = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=10, seed=4)
    assert whole["message"]["content"] == text_of(told) == reply.text
    assert reply.trace is not None
    tokens = whole["logprobs"]["content"]
    assert "".join(one["token"] for one in tokens) == reply.text
    assert [one["logprob"] for one in tokens] == pytest.approx(
        [math.log(t.p_after) for t in reply.trace.tokens], abs=1e-4
    )
    choices = [one["choices"][0] for one in told[1:]]
    assert [one for choice in choices for one in (choice["logprobs"] or {"content": ()})["content"]] == tokens
    assert [one["token_id"] for one in whole["detox"]["trace"]] == [one.token_id for one in reply.trace.tokens]
    streamed = [one for choice in choices for one in choice.get("detox", {}).get("trace", ())]
    assert streamed == whole["detox"]["trace"]
    assert "".join(plain["logprobs"]["tokens"]) == plain["text"]
    assert plain["logprobs"]["top_logprobs"] is None


def test_forced_json_and_calls_of_a_real_model_fit() -> None:
    model = DetoxiGen(make_tiny_backbone("llama", max_position_embeddings=2048))
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    with model, served(model, ServerConfig(guard=GuardPolicy(scorer=ScriptedScorer("never")))) as client:
        asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        text = chat(client, response_format=asked, max_tokens=60).json()["choices"][0]["message"]["content"]
        told = events(chat(client, tools=[tool], tool_choice="required", max_tokens=150, stream=True))
    assert json.loads(text)["a"] in ("x", "y")
    (call,) = [call for one in told for call in one["choices"][0]["delta"].get("tool_calls", ())]
    assert json.loads(call["function"]["arguments"])["a"] in ("x", "y")


def test_a_prompt_that_is_too_long_is_told_so(model: DetoxiGen) -> None:
    with served(model, ServerConfig(guard=None)) as client:
        response = client.post("/v1/completions", json={"prompt": "fox " * 2000})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_hanging_up_frees_a_real_engines_seat(model: DetoxiGen) -> None:
    with served(model, ServerConfig(guard=None, max_tokens=400)) as client:
        body = {"prompt": "The", "max_tokens": 400, "stream": True, "detox": {"alpha": 0}}
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_raw())
        wait_until(lambda: model.stats().seats == 0)
    stats = model.stats()
    assert (stats.cancelled, stats.finished) in ((1, 0), (0, 1))


def test_the_default_model_answers_a_chat() -> None:
    with DetoxiGen.from_pretrained(device="cpu", dtype="float32") as default, served(default) as client:
        told = chat(client, max_tokens=8, temperature=0).json()
    assert told["choices"][0]["detox"]["guard"] == "embedded"
    assert told["usage"]["completion_tokens"] <= 8
    assert told["choices"][0]["message"]["content"].strip()
