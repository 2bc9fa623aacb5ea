"""Whole and streamed answers of the routes, in OpenAI's form."""

from __future__ import annotations

from typing import Any

import pytest
from serving import CHAT, chat, events, served, text_of

from detox_guard import DecodingParams, EngineBusyError, GuardPolicy, PromptError, ScorerError, StepError
from detox_guard.server import ServerConfig
from detox_guard.testing import Said, ScriptedDetoxiGen, ScriptedScorer, tool_call

TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
WATCHFUL = ServerConfig(guard=GuardPolicy(scorer=ScriptedScorer("idiot")))


def test_a_chat_is_answered_whole() -> None:
    model = ScriptedDetoxiGen(["Hello, dear reader."])
    with served(model, WATCHFUL) as client:
        told = chat(client, max_tokens=9, temperature=0, seed=5, stop=["\n"], detox={"alpha": 2}).json()
    assert told["object"] == "chat.completion"
    assert told["id"].startswith("chatcmpl-")
    assert told["model"] == "scripted/words"
    (choice,) = told["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, dear reader.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["detox"]["alpha"] == 2
    assert choice["detox"]["guard"] == "scripted"
    assert told["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    params = model.calls[0].params
    assert (params.max_new_tokens, params.temperature, params.seed, params.stop) == (9, 0, 5, ("\n",))


def test_a_chat_is_streamed_in_openais_order() -> None:
    with served(ScriptedDetoxiGen(["Hello, dear reader."]), WATCHFUL) as client:
        told = events(chat(client, stream=True, stream_options={"include_usage": True}))
    deltas = [one["choices"][0]["delta"] for one in told[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert text_of(told) == "Hello, dear reader."
    assert [one["choices"][0]["finish_reason"] for one in told[:-1]] == [None] * (len(told) - 2) + ["stop"]
    assert told[-2]["choices"][0]["detox"]["finish_reason"] == "stop"
    assert told[-1]["choices"] == []
    assert told[-1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    assert {one["id"] for one in told} == {told[0]["id"]}


def test_several_choices_have_seeds_in_a_row_and_one_prompt() -> None:
    model = ScriptedDetoxiGen(lambda _, params: f"Reply {params.seed}.")
    with served(model, WATCHFUL) as client:
        whole = chat(client, n=3, seed=7).json()
        told = events(chat(client, n=3, seed=7, stream=True))
    assert [one["message"]["content"] for one in whole["choices"]] == ["Reply 7.", "Reply 8.", "Reply 9."]
    assert whole["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert [text_of(told, i) for i in range(3)] == ["Reply 7.", "Reply 8.", "Reply 9."]


def test_completions_take_one_text_or_several() -> None:
    model = ScriptedDetoxiGen(lambda prompt, params: f"after {prompt}")
    with served(model, WATCHFUL) as client:
        told = client.post("/v1/completions", json={"prompt": ["a", "a", "b"], "n": 2, "max_tokens": 4}).json()
        stream = events(client.post("/v1/completions", json={"prompt": "a b", "stream": True}))
    assert [one["text"] for one in told["choices"]] == ["after a"] * 4 + ["after b"] * 2
    assert told["object"] == "text_completion"
    assert told["usage"]["prompt_tokens"] == 3
    assert text_of(stream) == "after a b"
    assert stream[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_guard_ends_a_reply_with_its_replacement_and_openais_reason() -> None:
    model = ScriptedDetoxiGen(["All is fine. You idiot. And so on."])
    with served(model, WATCHFUL) as client:
        whole = chat(client).json()["choices"][0]
        response = chat(client, stream=True)
    told = events(response)
    assert whole["message"]["content"] == "All is fine. [removed]"
    assert whole["finish_reason"] == "content_filter"
    assert [one["action"] for one in whole["detox"]["interventions"]] == ["replace"]
    assert text_of(told) == "All is fine. [removed]"
    assert told[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert "idiot" not in response.text


def test_calls_of_tools_come_as_calls() -> None:
    said = "Let me see. " + tool_call("look", at="the fox") + tool_call("look", at="the dog")
    model = ScriptedDetoxiGen([said])
    with served(model, WATCHFUL) as client:
        whole = chat(client, tools=[TOOL]).json()["choices"][0]
        told = events(chat(client, tools=[TOOL], stream=True, parallel_tool_calls=False))
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"].strip() == "Let me see."
    functions = [call["function"] for call in whole["message"]["tool_calls"]]
    assert functions == [{"name": "look", "arguments": f'{{"at": "the {one}"}}'} for one in ("fox", "dog")]
    streamed = [call for one in told for call in one["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in streamed] == [(0, "look")]
    assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert model.calls[0].prompt.tools == (TOOL,)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_forced_call_is_held_to_its_grammar(choice: Any) -> None:
    model = ScriptedDetoxiGen([tool_call("look", at="x")])
    with served(model, WATCHFUL) as client:
        told = chat(client, tools=[TOOL], tool_choice=choice).json()["choices"][0]
    assert told["message"]["content"] is None
    assert model.calls[0].params.grammar.kind == "tool_calls"


def test_json_is_held_to_its_grammar_and_the_model_is_told_the_schema() -> None:
    model = ScriptedDetoxiGen(['{"a": 1}'])
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with served(model, WATCHFUL) as client:
        assert chat(client, response_format=asked).json()["choices"][0]["message"]["content"] == '{"a": 1}'
        chat(client, response_format={"type": "json_object"})
        chat(client, response_format={"type": "text"})
    assert [call.params.grammar and call.params.grammar.kind for call in model.calls] == [
        "json_schema", "json_schema", None
    ]  # fmt: skip
    assert '"integer"' in model.calls[0].prompt.messages[0]["content"]
    assert len(model.calls[1].prompt.messages) == 1


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty", "invalid_value"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"max_tokens": 5000}, "max_tokens", "invalid_value"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_value"),
        ({"n": 9}, "n", "too_many"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"colour": "blue"}, "colour", "unknown_parameter"),
        ({"detox": {"alpha": 101}}, "detox.alpha", "invalid_value"),
        ({"detox": {"guard": {"audit_log": "/tmp/x"}}}, None, None),
        ({"tools": [{"type": "function"}]}, "tools[0]", "invalid_value"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(changes: dict[str, Any], param: str | None, code: str | None) -> None:
    model = ScriptedDetoxiGen()
    with served(model, WATCHFUL) as client:
        response = chat(client, **changes)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert not model.calls


def test_what_changes_nothing_is_taken() -> None:
    idle = {"user": "me", "frequency_penalty": 0, "logit_bias": {}, "store": False, "n": 1, "stop": None, "tools": None}
    with served(ScriptedDetoxiGen(), WATCHFUL) as client:
        assert chat(client, **idle).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineBusyError("full"), 429, "busy"),
        (PromptError("messages[0]", "x", "other"), 400, "invalid_value"),
        (ScorerError("at /home/me/secret"), 503, "scorer_failed"),
        (StepError("at /home/me/secret"), 500, "engine_failed"),
        (RuntimeError("at /home/me/secret"), 500, "internal_error"),
    ],
)
def test_errors_come_in_openais_form_and_tell_no_secret(error: Exception, status: int, code: str) -> None:
    def broken(prompt: Any, params: DecodingParams) -> Said:
        raise error

    with served(ScriptedDetoxiGen(broken), WATCHFUL) as client:
        answers = [chat(client), chat(client, stream=True)]
    for response in answers:
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status == 429)


def test_an_error_under_way_is_an_event_and_never_a_silent_cut() -> None:
    with served(
        ScriptedDetoxiGen([Said("One two ", error=StepError("at /secret"))]), ServerConfig(guard=None)
    ) as client:
        told = events(chat(client, stream=True))
    assert text_of(told) == "One two "
    assert told[-1]["error"]["code"] == "engine_failed"
    assert "secret" not in str(told)


def test_models_are_asked_by_name() -> None:
    first, second = ScriptedDetoxiGen(["First."]), ScriptedDetoxiGen(["Second."])
    with served({"a": first, "org/b": second}, WATCHFUL) as client:
        listed = client.get("/v1/models").json()
        one = client.get("/v1/models/org/b").json()
        texts = [chat(client, **asked).json()["choices"][0]["message"]["content"] for asked in ({}, {"model": "org/b"})]
        missing = chat(client, model="c")
    assert [each["id"] for each in listed["data"]] == ["a", "org/b"]
    assert (one["id"], one["object"]) == ("org/b", "model")
    assert texts == ["First.", "Second."]
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_moderations_are_scored_by_sentence_and_whole() -> None:
    with served(ScriptedDetoxiGen(), WATCHFUL) as client:
        told = client.post("/v1/moderations", json={"input": ["All is fine.", "It is good. You idiot."]}).json()
        other = client.post("/v1/moderations", json={"input": "x", "model": "other"})
        parts = client.post("/v1/moderations", json={"input": [{"type": "text", "text": "idiot"}]}).json()
    assert told["model"] == "scripted"
    assert [one["flagged"] for one in told["results"]] == [False, True]
    assert told["results"][1]["category_scores"] == {"toxicity": 0.9}
    assert [one["flagged"] for one in told["results"][1]["sentences"]] == [False, True]
    assert other.status_code == 404
    assert parts["results"][0]["flagged"]


def test_the_guard_can_be_made_stricter_and_looser_only_where_it_is_allowed() -> None:
    fixed = WATCHFUL.replace(allow_unguarded=False)
    model = ScriptedDetoxiGen(["You idiot."])
    asked = {
        "off": {"guard": False},
        "looser": {"guard": {"threshold": 0.95}},
        "told": {"guard": {"keep_discarded": True}},
        "stricter": {"guard": {"threshold": 0.05}},
    }
    with served(model, fixed) as client:
        found = {name: chat(client, detox=detox) for name, detox in asked.items()}
    with served(model, WATCHFUL) as client:
        free = {name: chat(client, detox=detox) for name, detox in asked.items()}
    assert {name: one.status_code for name, one in found.items()} == {
        "off": 403, "looser": 403, "told": 403, "stricter": 200
    }  # fmt: skip
    assert {name: one.status_code for name, one in free.items()} == dict.fromkeys(asked, 200)
    assert free["off"].json()["choices"][0]["message"]["content"] == "You idiot."
    assert free["told"].json()["choices"][0]["detox"]["interventions"][0]["text"] == "You idiot."


def test_a_models_own_guard_comes_before_the_servers() -> None:
    own = ScriptedDetoxiGen(["You idiot."], params=DecodingParams(guard=GuardPolicy(scorer=ScriptedScorer("nothing"))))
    with served(own, WATCHFUL) as client:
        assert chat(client).json()["choices"][0]["message"]["content"] == "You idiot."


def test_routes_that_are_none_are_errors_of_the_same_form() -> None:
    with served(ScriptedDetoxiGen(), WATCHFUL) as client:
        missing, wrong = client.get("/v1/nothing"), client.get("/v1/completions")
        no_json = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").status_code == 200
        assert CHAT["messages"]
    assert (missing.status_code, wrong.status_code, no_json.status_code) == (404, 405, 400)
    assert all(one.json()["error"]["message"] for one in (missing, wrong, no_json))
