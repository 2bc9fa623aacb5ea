"""In front of another endpoint: guarded, never steered. The other endpoint is a scripted server of our own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from serving import chat, events, listening, served, text_of

from detox_guard import GuardPolicy, InvalidParamsError
from detox_guard.server import ServerConfig, create_app
from detox_guard.server.upstream import Upstream
from detox_guard.testing import Said, ScriptedDetoxiGen, ScriptedScorer, tool_call

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
PLAIN = ServerConfig(guard=None)
WATCHFUL = GuardPolicy(scorer=ScriptedScorer("idiot"))


@contextmanager
def in_front_of(script: Any, guard: GuardPolicy | None = WATCHFUL) -> Iterator[tuple[httpx.Client, ScriptedDetoxiGen]]:
    """A guarding server before a plain one."""
    behind = ScriptedDetoxiGen(script)
    with listening(create_app(behind, PLAIN)) as url:
        model = Upstream(url + "/v1")
        with served(model, ServerConfig(guard=guard)) as client:
            yield client, behind


def test_each_sentence_is_held_until_it_was_scored() -> None:
    with in_front_of(["All is fine. You idiot. And so on."]) as (client, behind):
        whole = chat(client, max_tokens=20, seed=4, stop=["\n\n"], temperature=0.5).json()
        response = chat(client, stream=True)
        told = events(response)
        legacy = client.post("/v1/completions", json={"prompt": "Hi"}).json()
    assert whole["model"] == "scripted/words"
    assert whole["choices"][0]["message"]["content"] == "All is fine. [removed] And so on."
    assert whole["choices"][0]["finish_reason"] == "content_filter"
    assert whole["choices"][0]["detox"]["guard"] == "scripted"
    assert whole["usage"]["completion_tokens"] == 8
    assert text_of(told) == legacy["choices"][0]["text"] == "All is fine. [removed] And so on."
    assert "idiot" not in response.text
    params = behind.calls[0].params
    assert (params.max_new_tokens, params.seed, params.stop, params.temperature) == (20, 4, ("\n\n",), 0.5)


def test_calls_of_tools_go_through_string_by_string() -> None:
    said = [tool_call("look", at="fox"), tool_call("look", at="You idiot", deep={"x": ["fine"]})]
    with in_front_of(said) as (client, behind):
        fine = chat(client, tools=[TOOL], tool_choice="required").json()["choices"][0]
        response = chat(client, tools=[TOOL], stream=True)
        told = events(response)
    (call,) = fine["message"]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": '{"at": "fox"}'}
    assert fine["finish_reason"] == "tool_calls"
    assert behind.calls[0].params.grammar.kind == "tool_calls"
    assert "idiot" not in response.text
    assert told[-1]["choices"][0]["finish_reason"] == "content_filter"


def test_a_schema_goes_through() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with in_front_of(['{"a": 1}']) as (client, behind):
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert chat(client, response_format=asked).json()["choices"][0]["message"]["content"] == '{"a": 1}'
    assert behind.calls[0].params.grammar.kind == "json_schema"


def test_a_prompt_may_be_scored_too() -> None:
    with in_front_of(["Hello."]) as (client, behind):
        asked = {"messages": [{"role": "user", "content": "You idiot."}], "detox": {"guard": {"scan_input": True}}}
        told = chat(client, **asked).json()["choices"][0]
    assert (told["message"]["content"], told["finish_reason"]) == ("[removed]", "content_filter")
    assert not behind.calls


def test_without_a_guard_it_comes_as_it_is_and_it_is_never_steered() -> None:
    with in_front_of(["You idiot."], None) as (client, _):
        assert chat(client).json()["choices"][0]["message"]["content"] == "You idiot."
        refused = [chat(client, detox={"alpha": 2}), chat(client, logprobs=True)]
    assert [one.status_code for one in refused] == [400, 400]
    assert [one.json()["error"]["param"] for one in refused] == ["detox.alpha", "logprobs"]


def test_hanging_up_here_hangs_up_there() -> None:
    with in_front_of(["One. Two."]) as (client, behind), behind.hold():
        with client.stream("POST", "/v1/completions", json={"prompt": "Hi", "stream": True}, timeout=None) as response:
            del response
        behind.wait_for(0)


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (Said("One. ", error=RuntimeError("secret")), 502, "upstream_failed"),
        (RuntimeError("secret"), 502, "upstream_failed"),
    ],
)
def test_an_engine_that_fails_is_an_error(said: Any, status: int, code: str) -> None:
    with in_front_of([said]) as (client, _):
        response = chat(client)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "secret" not in response.text


def test_an_engine_that_is_none_or_breaks_off_is_an_error() -> None:
    odd = FastAPI()

    @odd.post("/v1/chat/completions")
    async def _cut() -> PlainTextResponse:
        return PlainTextResponse('data: {"choices": [{"delta": {"content": "One. Two"}}]}\n\n')

    @odd.post("/v1/completions")
    async def _none() -> PlainTextResponse:
        return PlainTextResponse("data: <html>\n\n")

    with listening(odd) as url, served(Upstream(url + "/v1", "x"), ServerConfig(guard=WATCHFUL)) as client:
        cut, none = chat(client), client.post("/v1/completions", json={"prompt": "Hi"})
        streamed = events(chat(client, stream=True))
        with pytest.raises(InvalidParamsError):
            Upstream(url + "/v1")
    assert [one.json()["error"]["code"] for one in (cut, none)] == ["upstream_failed"] * 2
    assert streamed[-1]["error"]["code"] == "upstream_failed"
    with served(Upstream(url + "/v1", "x"), ServerConfig(guard=WATCHFUL)) as client:
        assert chat(client).status_code == 502
    with pytest.raises(InvalidParamsError):
        Upstream("file:///etc/passwd", "x")
