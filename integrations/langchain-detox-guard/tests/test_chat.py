"""ChatDetoxiGen against a scripted model: what LangChain's standard suite does not ask."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from detox_guard import ChatPrompt, DecodingParams, DetoxiGen, GuardPolicy, InvalidParamsError, PromptError
from detox_guard.testing import ScriptedDetoxiGen, tool_call
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.load import dumpd, load
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from pydantic import BaseModel

from langchain_detox_guard import ChatDetoxiGen
from langchain_scripts import WINDOW, add, whole


def test_construction_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: pytest.fail("loaded"))
    chat = ChatDetoxiGen(model="some/model")
    chat.bind_tools([add], tool_choice="any")
    chat.with_structured_output({"type": "object"})
    assert chat.profile is not None
    assert dumpd(chat)


def test_defaults_are_the_cores(detoxigen: ScriptedDetoxiGen) -> None:
    ChatDetoxiGen(detoxigen=detoxigen).invoke("Hi")
    assert detoxigen.calls[-1][2] == DecodingParams()


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


# -- caches, identity, counting


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


def test_one_bad_prompt_is_isolated(chat: ChatDetoxiGen) -> None:
    good, bad = chat.batch(["Hi", "word " * (WINDOW + 1)], return_exceptions=True)
    assert good.content
    assert isinstance(bad, ContextOverflowError)
