"""ChatDetoxiGen against a scripted model: what LangChain's standard suite does not ask."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from typing import Any

import pytest
from detox_guard import ChatPrompt, DecodingParams, DetoxiGen, Grammar, GuardPolicy, InvalidParamsError, PromptError
from detox_guard.testing import Said, ScriptedDetoxiGen, tool_call
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.globals import set_llm_cache
from langchain_core.load import dumpd, load
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import tool
from pydantic import BaseModel
from typing_extensions import TypedDict

from langchain_detox_guard import ChatDetoxiGen, IncompleteAnswerError
from langchain_scripts import WINDOW, obliging


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return word


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
def chat(detoxigen: ScriptedDetoxiGen) -> ChatDetoxiGen:
    return ChatDetoxiGen(detoxigen=detoxigen, seed=1)


def whole(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


def test_construction_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: pytest.fail("loaded"))
    chat = ChatDetoxiGen(model="some/model")
    chat.bind_tools([add], tool_choice="any")
    chat.with_structured_output({"type": "object"})
    assert chat.profile is not None
    assert dumpd(chat)


def test_defaults_are_the_cores() -> None:
    assert ChatDetoxiGen()._decoding_params() == DecodingParams()


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"apha": 2.0}, {"tool": []}])
def test_bad_names_are_named(chat: ChatDetoxiGen, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))):
        chat.invoke("Hi", **bad)
    with pytest.raises(ValueError, match=next(iter(bad))):
        ChatDetoxiGen(**bad)


def test_an_engine_has_its_own_names(detoxigen: ScriptedDetoxiGen) -> None:
    with pytest.raises(ValueError, match="model"):
        ChatDetoxiGen(detoxigen=detoxigen, model="some/model")


def test_keywords_and_guard_reach_the_engine(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    policy = GuardPolicy(threshold=0.3)
    chat.bind(alpha=3.0, max_tokens=5, guard=policy).invoke("Hi", stop=["x"])
    assert detoxigen.calls[-1][2] == DecodingParams(alpha=3.0, max_new_tokens=5, stop=("x",), seed=1, guard=policy)


# -- messages


def test_messages_become_the_cores(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "c1", "type": "tool_call"}
    chat.bind_tools([add]).invoke(
        [
            SystemMessage("Be"),
            SystemMessage("kind."),
            HumanMessage([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]),
            AIMessage([{"type": "text", "text": "so"}, {"type": "tool_use", "id": "c1", "name": "add", "input": {}}],
                      tool_calls=[call]),
            ToolMessage("3", tool_call_id="c1", name="add"),
            ChatMessage("and?", role="critic"),
        ]
    )  # fmt: skip
    prompt = detoxigen.calls[-1][1]
    assert isinstance(prompt, ChatPrompt)
    function = {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert list(prompt.messages) == [
        {"role": "system", "content": "Be\nkind."},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "so", "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        {"role": "critic", "content": "and?"},
    ]
    assert [tool["function"]["name"] for tool in prompt.tools] == ["add"]


def test_neighbouring_messages_of_other_roles_stay_apart(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    chat.invoke([ChatMessage("a", role="user"), ChatMessage("b", role="critic"), ChatMessage("c", role="critic")])
    assert [(one["role"], one["content"]) for one in detoxigen.calls[-1][1].messages] == [
        ("user", "a"),
        ("critic", "b\nc"),
    ]


def test_pictures_are_refused_by_name(chat: ChatDetoxiGen) -> None:
    with pytest.raises(PromptError, match="image"):
        chat.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])


def test_errors_are_langchains_too(chat: ChatDetoxiGen) -> None:
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * (WINDOW + 1))


# -- streams


async def test_all_ways_say_the_same(chat: ChatDetoxiGen) -> None:
    message = chat.invoke("Hi")
    chunks = list(chat.stream("Hi"))
    achunks = [chunk async for chunk in chat.astream("Hi")]
    others = [whole(chunks), whole(achunks), await chat.ainvoke("Hi"), chat.batch(["Ho", "Hi"])[1]]
    others += [(await chat.abatch(["Hi", "Ho"]))[0], chat.invoke("Hi", streaming=True)]
    for other in others:
        assert other.content == message.content
        assert other.usage_metadata == message.usage_metadata
        assert other.response_metadata == message.response_metadata
    assert len(chunks) > 3


def test_the_last_chunk_alone_reports(chat: ChatDetoxiGen) -> None:
    chunks = list(chat.stream("Hi"))
    assert [bool(chunk.usage_metadata) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert not any(chunk.response_metadata.get("detox") for chunk in chunks[:-1])
    last = chunks[-1]
    assert last.chunk_position == "last"
    assert last.response_metadata["finish_reason"] == "stop"
    assert last.response_metadata["model_name"] == "scripted/words"
    assert last.response_metadata["detox"]["alpha"] == 3.0
    assert json.dumps(last.response_metadata["detox"])


def test_callbacks_fire_exactly_once(chat: ChatDetoxiGen) -> None:
    events: list[str] = []

    class Log(BaseCallbackHandler):
        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            events.append("start")

        def on_llm_new_token(self, token: str, **_: Any) -> None:
            events.append(token)

        def on_llm_end(self, *_: Any, **__: Any) -> None:
            events.append("end")

    text = "".join(str(chunk.content) for chunk in chat.stream("Hi", {"callbacks": [Log()]}))
    assert (events[0], "".join(events[1:-1]), events[-1]) == ("start", text, "end")
    events.clear()
    chat.invoke("Hi", {"callbacks": [Log()]})
    assert events == ["start", "end"]


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


# -- caches, identity, counting


async def test_the_cache_serves_the_same_and_never_another_alpha(
    chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen
) -> None:
    set_llm_cache(InMemoryCache())
    text = chat.invoke("Hi").content
    assert (chat.invoke("Hi").content, len(detoxigen.calls)) == (text, 1)
    assert ((await chat.ainvoke("Hi")).content, len(detoxigen.calls)) == (text, 1)
    for other in ({"alpha": 0.0}, {"seed": 2}, {"stop": ["dear"]}, {"max_tokens": 2}):
        before = len(detoxigen.calls)
        fresh = chat.invoke("Hi", **other).content  # type: ignore[arg-type]
        assert ChatDetoxiGen(detoxigen=detoxigen, **{"seed": 1, **other}).invoke("Hi").content == fresh
        assert len(detoxigen.calls) == before + 1, other
    assert chat.bind_tools([add]).invoke("Hi").tool_calls  # type: ignore[attr-defined]


def test_unseeded_sampling_is_not_cached(detoxigen: ScriptedDetoxiGen) -> None:
    set_llm_cache(InMemoryCache())
    ChatDetoxiGen(detoxigen=detoxigen).batch(["Hi"] * 3)
    assert len(detoxigen.calls) == 3


def test_tracing_parameters() -> None:
    params = ChatDetoxiGen(model="some/model", stop=["x"])._get_ls_params(temperature=0.5)
    assert params == {
        "ls_provider": "detox_guard", "ls_model_type": "chat", "ls_model_name": "some/model",
        "ls_temperature": 0.5, "ls_max_tokens": 256, "ls_stop": ["x"],
    }  # fmt: skip


class Tree(BaseModel):
    """A tree."""

    name: str
    children: list[Tree] = []


SHAPE = {"type": "object", "properties": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "held"),
    [
        (Tree, Tree.model_json_schema()),
        (SHAPE, SHAPE),
        ({"name": "shape", "strict": True, "schema": SHAPE}, SHAPE),
        ({"name": "shape", **SHAPE}, {"name": "shape", **SHAPE}),
        ({"name": "shape", "description": "A shape.", "parameters": SHAPE},
         {"title": "shape", "description": "A shape.", **SHAPE}),
    ],
)  # fmt: skip
def test_a_schema_loses_nothing(
    chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen, schema: Any, held: dict[str, Any]
) -> None:
    detoxigen.script = lambda *_: "{}"
    chat.with_structured_output(schema, include_raw=True).invoke("Hi")
    grammar = detoxigen.calls[-1][2].grammar
    assert grammar is not None
    assert json.loads(grammar.body) == held


def test_a_tool_that_is_no_function_is_named(chat: ChatDetoxiGen) -> None:
    with pytest.raises(InvalidParamsError, match=r"tools\[0\]"):
        chat.bind_tools([{"type": "web_search"}])


def test_streamed_blocks_keep_text_and_calls_apart(detoxigen: ScriptedDetoxiGen) -> None:
    detoxigen.script = lambda *_: "Let me see. " + tool_call("add", a=1, b=2) + tool_call("add", a=3, b=4)
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1, output_version="v1").bind_tools([add])
    blocks = whole(list(chat.stream("Hi"))).content_blocks
    assert [block["type"] for block in blocks] == ["text", "tool_call", "tool_call"]
    assert [block["args"]["a"] for block in blocks[1:]] == [1, 3]  # type: ignore[typeddict-item]


@pytest.mark.parametrize("kind", ["redacted_thinking", "refusal", "invalid_tool_call", "server_tool_call"])
def test_another_models_history_can_be_gone_on_with(
    chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen, kind: str
) -> None:
    said = AIMessage([{"type": kind, "data": "x", "id": "1", "name": "f", "args": {}}, {"type": "text", "text": "So."}])
    chat.invoke([HumanMessage("Hi"), said, HumanMessage("And?")])
    assert detoxigen.calls[-1][1].messages[1] == {"role": "assistant", "content": "So."}


def test_parts_of_a_chat_are_counted(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    def strict(prompt: Any) -> int:
        if prompt.messages[0]["role"] != "user":
            raise PromptError("messages", prompt.messages, "the user's turn first")
        return 99

    detoxigen.count_tokens = strict  # type: ignore[method-assign]
    assert chat.get_num_tokens_from_messages([]) == 0
    assert chat.get_num_tokens_from_messages([HumanMessage("Hi there")]) == 99
    assert chat.get_num_tokens_from_messages([AIMessage("Hi there"), HumanMessage("you")]) == 3


def test_tokens_are_the_models_own(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    assert chat.get_num_tokens("three words here") == 3
    messages = [HumanMessage("three words here")]
    prompt = ChatPrompt([{"role": "user", "content": "three words here"}], ())
    assert chat.get_num_tokens_from_messages(messages) == detoxigen.count_tokens(prompt)
    assert chat.get_num_tokens_from_messages(messages, tools=[add]) > detoxigen.count_tokens(prompt)


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_serialization_is_names_and_numbers() -> None:
    chat = ChatDetoxiGen(model="some/model", alpha=3.0, stop=["x"], guard=GuardPolicy(threshold=0.3, ladder=(2.5,)))
    again = load(dumpd(chat), valid_namespaces=["langchain_detox_guard"], allowed_objects=[ChatDetoxiGen])
    assert again == chat
    assert pickle.loads(pickle.dumps(chat)) == chat


# -- sharing the batch


def test_batch_runs_together() -> None:
    for config, together in ((None, 16), ({"max_concurrency": 2}, 2)):
        detoxigen = ScriptedDetoxiGen(together=together)
        assert len(ChatDetoxiGen(detoxigen=detoxigen).batch(["Hi"] * 16, config)) == 16
        assert detoxigen.most_active == together


@pytest.mark.parametrize("return_exceptions", [False, True])
async def test_a_long_abatch_does_not_flood_the_queue(return_exceptions: bool) -> None:
    detoxigen = ScriptedDetoxiGen(together=256)
    replies = await ChatDetoxiGen(detoxigen=detoxigen).abatch(["Hi"] * 300, return_exceptions=return_exceptions)
    assert len(replies) == 300
    assert detoxigen.most_active == 256


def test_one_bad_prompt_is_isolated(chat: ChatDetoxiGen) -> None:
    good, bad = chat.batch(["Hi", "word " * (WINDOW + 1)], return_exceptions=True)
    assert good.content
    assert isinstance(bad, ContextOverflowError)


@pytest.mark.parametrize("way", ["ainvoke", "astream"])
async def test_a_cancelled_task_frees_its_seat(way: str) -> None:
    detoxigen = ScriptedDetoxiGen()
    chat = ChatDetoxiGen(detoxigen=detoxigen)

    async def run() -> None:
        if way == "astream":
            _ = [chunk async for chunk in chat.astream("Hi")]
        else:
            await chat.ainvoke("Hi")

    with detoxigen.hold():
        task = asyncio.create_task(run())
        await asyncio.to_thread(detoxigen.wait_for, 1)  # the loop is free while it waits
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(detoxigen.wait_for, 0)
    assert detoxigen.abandoned == 1


async def test_loading_happens_off_the_loop(monkeypatch: pytest.MonkeyPatch, detoxigen: ScriptedDetoxiGen) -> None:
    loading, loaded = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def shared(*_: Any, **__: Any) -> ScriptedDetoxiGen:
        loop.call_soon_threadsafe(loading.set)
        assert loaded.wait(30)
        return detoxigen

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    task = asyncio.create_task(ChatDetoxiGen().ainvoke("Hi"))
    await loading.wait()
    loaded.set()
    assert (await task).content


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


# -- templates, windows and other providers' histories


def test_variables_of_the_template(detoxigen: ScriptedDetoxiGen) -> None:
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1, chat_template_kwargs={"thinking": False})
    for model, seen in (
        (chat, {"thinking": False}),
        (chat.bind(chat_template_kwargs={"thinking": True}), {"thinking": True}),
        (chat.bind(chat_template_kwargs=None).bind_tools([add]), {}),
    ):
        model.invoke("Hi")
        assert detoxigen.calls[-1][1].chat_template_kwargs == seen
    chat.invoke("Hi", chat_template_kwargs={"other": 1})
    assert detoxigen.calls[-1][1].chat_template_kwargs == {"other": 1}
    with pytest.raises(InvalidParamsError, match="chat_template_kwargs"):
        ChatDetoxiGen(chat_template_kwargs="off")  # type: ignore[arg-type]


def test_the_window_is_in_the_profile_and_loads_nothing_before_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, detoxigen: ScriptedDetoxiGen
) -> None:
    asked: list[Any] = []

    def shared(model: Any, **_: Any) -> ScriptedDetoxiGen:
        asked.append(model)
        return detoxigen

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    chat = ChatDetoxiGen(model="some/model", max_tokens=7)
    assert chat.profile is not None
    assert (chat.profile["tool_calling"], chat.profile["max_output_tokens"], asked) == (True, 7, [])
    other = chat.model_copy(update={"model": "other/model"})
    assert other.profile is not None
    assert "max_input_tokens" in other.profile
    assert other.profile["max_input_tokens"] == other.profile.get("max_input_tokens") == WINDOW
    assert asked == ["other/model"]
    assert pickle.loads(pickle.dumps(chat)).profile.get("max_input_tokens") == WINDOW
    own = ChatDetoxiGen(model="some/model", profile={"max_input_tokens": 9}).model_copy(update={"alpha": 1.0})
    assert own.profile == {"max_input_tokens": 9}


CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
USED = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}


@pytest.mark.parametrize(
    ("history", "read"),
    [
        ([{"role": "developer", "content": "Be kind."}, ("user", "Hi")], [("system", "Be kind."), ("user", "Hi")]),
        ([ChatMessage("Be kind.", role="developer"), ChatMessage("Hi", role="human")],
         [("system", "Be kind."), ("user", "Hi")]),
        ([("user", "Hi"), {"role": "assistant", "content": None, "tool_calls": [
            {**CALLED, "function": {"name": "f", "arguments": '{"a": 1}'}}]},
          {"role": "tool", "tool_call_id": "c1", "content": None}],
         [("user", "Hi"), ("assistant", "", "c1"), ("tool", "", "c1")]),
        ([HumanMessage("Hi"), AIMessage("", additional_kwargs={
            "function_call": {"name": "f", "arguments": '{"a": 1}'}}),
          FunctionMessage("Yes.", name="f")],
         [("user", "Hi"), ("assistant", "", "call00000"), ("tool", "Yes.", "call00000")]),
        ([HumanMessage("Hi"), AIMessage([USED]), HumanMessage([
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "Yes."}]},
            {"type": "text", "text": "And?"}])],
         [("user", "Hi"), ("assistant", "", "c1"), ("tool", "Yes.", "c1"), ("user", "And?")]),
        ([HumanMessage("Hi"), AIMessage("", tool_calls=[{"name": "f", "args": {"a": 1}, "id": None}]),
          ToolMessage([{"type": "json", "json": {"b": 2}}], tool_call_id="")],
         [("user", "Hi"), ("assistant", "", "call00000"), ("tool", '{"b": 2}', "call00000")]),
        ([HumanMessage([{"type": "input_text", "text": "Hi"}]), AIMessage([{"type": "output_text", "text": "So."}])],
         [("user", "Hi"), ("assistant", "So.")]),
        ([HumanMessage("Hi"), AIMessage([{"type": "text", "text": None}]), HumanMessage("And?")],
         [("user", "Hi"), ("assistant", ""), ("user", "And?")]),
        ([HumanMessage("Hi"), AIMessage("Half", invalid_tool_calls=[
            {"name": "f", "args": "{", "id": None, "error": None}]), HumanMessage("And?")],
         [("user", "Hi"), ("assistant", "Half"), ("user", "And?")]),
    ],
)  # fmt: skip
def test_histories_of_others(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen, history: Any, read: Any) -> None:
    chat.invoke(history)
    said = detoxigen.calls[-1][1].messages
    assert [
        (one["role"], one["content"], *(call["id"] for call in one.get("tool_calls", ())),
         *([one["tool_call_id"]] if one["role"] == "tool" else []))
        for one in said
    ] == read  # fmt: skip
    for call in (call for one in said for call in one.get("tool_calls", ())):
        assert call["function"] == {"name": "f", "arguments": {"a": 1}}


def test_an_unreadable_call_that_was_answered_stays_a_turn(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    broken = AIMessage("", invalid_tool_calls=[{"name": "f", "args": "{", "id": "c1", "error": None}])
    chat.invoke([HumanMessage("Hi"), broken, ToolMessage("Not done.", tool_call_id="c1")])
    assert [one["role"] for one in detoxigen.calls[-1][1].messages] == ["user", "assistant", "tool"]
    assert detoxigen.calls[-1][1].messages[1]["tool_calls"][0]["id"] == "c1"


@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": "x"}], [{"type": "audio"}]])
def test_what_is_no_text_is_named(chat: ChatDetoxiGen, content: Any) -> None:
    with pytest.raises(PromptError, match=r"messages\[0\].content"):
        chat.invoke([HumanMessage(content)])


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
