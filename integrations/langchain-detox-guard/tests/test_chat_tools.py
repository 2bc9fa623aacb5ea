"""ChatDetoxiGen: tools, structured output, and answers that were cut."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from detox_guard import Grammar, InvalidParamsError
from detox_guard.testing import Said, ScriptedDetoxiGen, tool_call
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    SystemMessage,
)
from pydantic import BaseModel
from typing_extensions import TypedDict

from langchain_detox_guard import ChatDetoxiGen, IncompleteAnswerError
from langchain_scripts import add, look_up, obliging, whole

# -- tools

CALL = tool_call("add", a=1, b=2)


@pytest.mark.parametrize(
    ("choice", "normal"),
    [
        (None, "auto"), ("auto", "auto"), ("none", "none"), (False, "none"), ("any", "any"), ("required", "any"),
        (True, "any"), ("add", "add"), ({"type": "function", "function": {"name": "add"}}, "add"),
        ({"type": "tool", "name": "add"}, "add"), ({"type": "any"}, "any"),
    ],
)  # fmt: skip
def test_every_tool_choice(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen, choice: Any, normal: str) -> None:
    chat.bind_tools([look_up, add], tool_choice=choice).invoke("Hi")
    _, prompt, params = detoxigen.calls[-1]
    assert len(prompt.tools) == (0 if normal == "none" else 2)
    expected = {
        "any": Grammar.tool_calls(prompt.tools or [{}]) if normal == "any" else None,
        "add": Grammar.tool_calls(prompt.tools, name="add") if normal == "add" else None,
    }
    assert params.grammar == expected.get(normal)


@pytest.mark.parametrize("choice", ["subtract", {"type": "function", "function": {"name": "subtract"}}, 3])
def test_an_unknown_tool_choice_is_named(chat: ChatDetoxiGen, choice: Any) -> None:
    with pytest.raises(InvalidParamsError, match="tool_choice"):
        chat.bind_tools([add], tool_choice=choice)


def test_a_choice_without_tools_is_named(chat: ChatDetoxiGen) -> None:
    with pytest.raises(InvalidParamsError, match="tool_choice"):
        chat.bind_tools([], tool_choice="any")


async def test_calls_stream_as_they_are_invoked(detoxigen: ScriptedDetoxiGen) -> None:
    detoxigen.script = lambda *_: f"Let me see.\n{CALL}\n{CALL}"
    chat = ChatDetoxiGen(detoxigen=detoxigen).bind_tools([add])
    message = chat.invoke("Hi")
    streams = [list(chat.stream("Hi")), [chunk async for chunk in chat.astream("Hi")]]
    for other in [message, *(whole(chunks) for chunks in streams)]:  # type: ignore[arg-type]
        assert str(other.content).strip() == "Let me see."
        assert [(call["name"], call["args"]) for call in other.tool_calls] == [("add", {"a": 1, "b": 2})] * 2
        assert len({call["id"] for call in other.tool_calls}) == 2
        assert not other.invalid_tool_calls
    assert all("tool_call" not in str(chunk.content) for chunk in streams[0])


def test_parallel_calls_can_be_declined(detoxigen: ScriptedDetoxiGen) -> None:
    detoxigen.script = lambda *_: f"{CALL}\n{CALL}"
    chat = ChatDetoxiGen(detoxigen=detoxigen).bind_tools([add], parallel_tool_calls=False)
    for message in (chat.invoke("Hi"), whole(list(chat.stream("Hi")))):  # type: ignore[arg-type]
        assert [call["name"] for call in message.tool_calls] == ["add"]
        assert not message.invalid_tool_calls


def test_a_broken_call_is_invalid_and_never_content(detoxigen: ScriptedDetoxiGen) -> None:
    """The reply was cut inside the arguments: nobody may get the half that was said as if it were the whole."""
    detoxigen.script = lambda *_: CALL[:50]
    chat = ChatDetoxiGen(detoxigen=detoxigen).bind_tools([add])
    for message in (chat.invoke("Hi"), whole(list(chat.stream("Hi")))):  # type: ignore[arg-type]
        assert message.content == ""
        assert not message.tool_calls
        assert len(message.invalid_tool_calls) == 1


def test_text_without_tools_is_left_alone(detoxigen: ScriptedDetoxiGen) -> None:
    detoxigen.script = lambda *_: CALL
    assert ChatDetoxiGen(detoxigen=detoxigen).invoke("Hi").content == CALL


# -- structured output


class Person(BaseModel):
    """A person."""

    name: str
    age: int


SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_methods_hold_to_the_schema(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen, method: Any) -> None:
    assert isinstance(chat.with_structured_output(Person, method=method).invoke("Hi"), Person)
    _, prompt, params = detoxigen.calls[-1]
    assert params.grammar is not None
    assert params.grammar.kind == ("tool_calls" if method == "function_calling" else "json_schema")
    assert len(prompt.tools) == (method == "function_calling")
    told = prompt.messages[0]
    assert (told["role"] == "system" and '"age"' in told["content"]) == (method == "json_schema")


def test_a_bare_schema_gives_a_dict(chat: ChatDetoxiGen) -> None:
    assert chat.with_structured_output(SCHEMA).invoke("Hi") == {"name": "some name"}


def test_json_mode_needs_no_schema(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    assert isinstance(chat.with_structured_output(method="json_mode").invoke("Hi"), dict)
    assert detoxigen.calls[-1][2].grammar == Grammar.json_object()


def test_the_schema_joins_the_system_message(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    chat.with_structured_output(SCHEMA).invoke([SystemMessage("Be kind."), HumanMessage("Hi")])
    roles = [message["role"] for message in detoxigen.calls[-1][1].messages]
    assert roles == ["system", "user"]
    assert detoxigen.calls[-1][1].messages[0]["content"].startswith("Be kind.\n\nAnswer only with JSON")


def test_include_raw_keeps_the_message_and_the_error(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    good = chat.with_structured_output(Person, include_raw=True).invoke("Hi")
    assert isinstance(good["raw"], AIMessage)
    assert isinstance(good["parsed"], Person)
    assert good["parsing_error"] is None
    detoxigen.script = lambda *_: '{"name": 3'
    bad = chat.with_structured_output(Person, include_raw=True).invoke("Hi")
    assert bad["parsed"] is None
    assert bad["parsing_error"] is not None


@pytest.mark.parametrize("bad", [{}, {"schema": SCHEMA, "method": "other"}, {"schema": 3}])
def test_bad_structured_output_is_named(chat: ChatDetoxiGen, bad: dict[str, Any]) -> None:
    with pytest.raises((InvalidParamsError, ValueError)):
        chat.with_structured_output(**bad).invoke("Hi")


def test_the_models_stop_strings_give_way_to_a_grammar(detoxigen: ScriptedDetoxiGen) -> None:
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1, stop=["some"])
    assert chat.with_structured_output(Person).invoke("Hi") == Person(name="some name", age=3)
    assert chat.bind_tools([add], tool_choice="any").invoke("Hi").tool_calls
    with pytest.raises(InvalidParamsError, match="stop"):
        chat.with_structured_output(Person).invoke("Hi", stop=["some"])
    assert chat.invoke("Hi", stop="reader").content == "Hello, dear "  # one string, not its letters


def test_a_response_format_beside_tools_is_refused(chat: ChatDetoxiGen) -> None:
    with pytest.raises(InvalidParamsError, match="response_format"):
        chat.bind_tools([add]).bind(response_format={"type": "json_object"}).invoke("Hi")


# -- unfinished answers


class Named(TypedDict):
    """Named."""

    name: str


@pytest.mark.parametrize("schema", [Person, Named, {"title": "Named", **SCHEMA}], ids=["pydantic", "typed", "dict"])
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("reason", ["length", "guard"])
async def test_what_was_cut_is_no_structured_answer(method: Any, schema: Any, reason: Any) -> None:
    detoxigen = ScriptedDetoxiGen(lambda *asked: Said(str(obliging(*asked)), finish_reason=reason))
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1, max_tokens=2 if reason == "length" else 256)
    model = chat.with_structured_output(schema, method=method)
    for ask in (lambda: model.invoke("Hi"), lambda: list(model.stream("Hi")), lambda: model.batch(["Hi", "you"])):
        with pytest.raises(IncompleteAnswerError, match=reason) as told:
            ask()
        assert told.value.finish_reason == reason
        assert pickle.loads(pickle.dumps(told.value)).finish_reason == reason
    with pytest.raises(IncompleteAnswerError):
        await model.ainvoke("Hi")
    with pytest.raises(IncompleteAnswerError):
        _ = [chunk async for chunk in model.astream("Hi")]
    raw = chat.with_structured_output(schema, method=method, include_raw=True)
    merged: dict[str, Any] = {}
    for part in raw.stream("Hi"):
        merged |= part
    for out in (raw.invoke("Hi"), await raw.ainvoke("Hi"), merged):
        assert isinstance(out["raw"], AIMessage)
        assert out["parsed"] is None
        assert isinstance(out["parsing_error"], IncompleteAnswerError)


def test_a_forced_call_that_was_cut_raises_or_is_kept(detoxigen: ScriptedDetoxiGen) -> None:
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1, max_tokens=2)
    for choice in ("any", "add"):
        with pytest.raises(IncompleteAnswerError) as told:
            chat.bind_tools([add], tool_choice=choice).invoke("Hi")
        assert "max_tokens" in told.value.hint
        kept = chat.bind_tools([add], tool_choice=choice, unfinished="keep").invoke("Hi")
        assert (kept.tool_calls, len(kept.invalid_tool_calls)) == ([], 1)
    assert chat.bind_tools([add]).invoke("Hi").content  # nothing was forced: text may end anywhere
    with pytest.raises(InvalidParamsError, match="unfinished"):
        chat.bind_tools([add], unfinished="maybe").invoke("Hi")


def test_a_whole_answer_streams_in_parts(chat: ChatDetoxiGen) -> None:
    parts = list(chat.with_structured_output(SCHEMA).stream("Hi"))
    assert parts[-1] == {"name": "some name"}
    raw = list(chat.with_structured_output(Person, include_raw=True).stream("Hi"))
    assert raw[-1]["parsed"] == Person(name="some name", age=3)


class _Reading(BaseModel):
    """Tags of one thing, each once."""

    tags: set[str]


def test_a_class_that_checks_the_answer_itself_may_have_what_no_grammar_holds_to() -> None:
    """A set is `uniqueItems`, which a grammar cannot assert: pydantic does, after it."""
    detoxigen = ScriptedDetoxiGen(lambda prompt, params: '{"tags": ["a", "b"]}')
    chat, schema = ChatDetoxiGen(detoxigen=detoxigen), _Reading.model_json_schema()
    for method in ("json_schema", "json_mode"):
        assert chat.with_structured_output(_Reading, method=method).invoke("Tags?") == _Reading(tags={"a", "b"})
        assert detoxigen.calls[-1][2].grammar == Grammar.json_schema(schema, lenient=True)
        chat.with_structured_output(schema, method=method).invoke("Tags?")
        assert (
            detoxigen.calls[-1][2].grammar == Grammar.json_schema(schema) != Grammar.json_schema(schema, lenient=True)
        )


def test_arguments_without_quotes_are_read_by_the_tools_schema() -> None:
    """Qwen3-Coder writes a number without saying that it is none of text; the tool's schema says."""
    written = "<tool_call>\n<function=add>\n<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>"
    tool = {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"count": {"type": "integer"}}},
    }
    chat = ChatDetoxiGen(detoxigen=ScriptedDetoxiGen(lambda prompt, params: written)).bind_tools([tool])
    assert chat.invoke("Add 3.").tool_calls[0]["args"] == {"count": 3}
    whole = None
    for chunk in chat.stream("Add 3."):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.tool_calls[0]["args"] == {"count": 3}
