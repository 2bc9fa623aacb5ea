"""DetoxMiddleware reads every word of an answer and of a tool's result, and no envelope."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from detox_guard import GuardError, GuardPolicy, InvalidParamsError, screen
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer
from langchain.agents import AgentState, create_agent
from langchain.agents.structured_output import ProviderStrategy, StructuredOutputValidationError, ToolStrategy
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.types import Command, Overwrite
from pydantic import BaseModel, Field

from agent_scripts import Foreign, Verdict
from langchain_detox_guard import ChatDetoxiGen, DetoxMiddleware, IncompleteAnswerError
from langchain_detox_guard._words import words_of
from langchain_scripts import ROTTEN, obliging

# -- every word

ROT = "It is rotten."


def call_of(args: Any, name: str = "read_note", call_id: str = "c1") -> list[Any]:
    return [{"name": name, "args": args, "id": call_id}]


@pytest.mark.parametrize(
    "said",
    [
        AIMessage("Fine.", name="rotten"),
        AIMessage("Fine.", id="so_rotten"),
        AIMessage("Fine.", additional_kwargs={ROT: 1}),
        AIMessage("Fine.", additional_kwargs={"audio": {"transcript": ROT}}),
        AIMessage("Fine.", additional_kwargs={"details": [{"json": '{"a": "r\\u006ftten"}'}]}),
        AIMessage("Fine.", response_metadata={"logprobs": {"content": [{"token": "rotten"}]}}),
        AIMessage([{"type": "text", "text": "Fine."}, {"type": "refusal", "refusal": ROT}]),
        AIMessage([{"type": "text", "text": "Fine.", "annotations": [{"title": ROT}]}]),
        AIMessage(["Fine.", {"type": "server_tool_result", "output": [{"deep": [ROT]}]}]),
        AIMessage("Fine.", comment=ROT),
        AIMessage("Fine.", invalid_tool_calls=[{"name": "f", "args": '{"a": "r\\u006ftten', "id": "1", "error": None}]),
        AIMessage("Fine.", tool_calls=call_of({"name": "a", "extra": {"rotten": 1}})),
        AIMessage("Fine.", tool_calls=call_of({"name": '{"a": ["r\\u006ftten"]}'})),
        AIMessage("Fine.", tool_calls=call_of({"name": "a"}, name="so_rotten")),
        AIMessage("Fine.", tool_calls=call_of({"name": "a"}, call_id="so_rotten")),
    ],
    ids=str,
)
def test_no_field_of_an_answer_is_left_out(said: AIMessage) -> None:
    model = Foreign(messages=iter([said, AIMessage("Done.")]))
    agent = create_agent(model, [read_text], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=())])
    out = agent.invoke({"messages": [HumanMessage("?")]})
    assert out["detox"][0]["action"] == "mask"
    assert "rotten" not in repr(out["messages"])
    assert "u006ftten" not in repr(out["messages"])
    assert out["messages"][1].text == "Fine."


@tool("read_note")
def read_text(name: Any, extra: Any = None) -> str:
    """Read a note."""
    return "An empty note."


@tool
def rotten_tool(rotten: str) -> str:
    """A developer's own words."""
    return "Well."


def test_the_developers_own_words_are_not_the_models() -> None:
    said = AIMessage("Fine.", tool_calls=call_of({"rotten": "x"}, name="rotten_tool"))
    model = Foreign(messages=iter([said, AIMessage("Done.")]))
    agent = create_agent(model, [rotten_tool], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=())])
    out = agent.invoke({"messages": [HumanMessage("?")]})
    assert out["messages"][1].tool_calls[0]["args"] == {"rotten": "x"}
    assert [message.type for message in out["messages"]] == ["human", "ai", "tool", "ai"]


def test_drawn_ids_are_no_words() -> None:
    drawn = ["call_Ab3dEf9GhJk2", "toolu_01Xy", "3f2a9c1b-77de-4c1a-9f00-0a1b2c3d4e5f", "9b9f41db7", "lc_run--01a22b"]
    assert {word for one in drawn for word in words_of({"id": one}, envelope=True)} <= {"call", "toolu", "lc run"}
    assert words_of({"id": "you_rotten_thing"}, envelope=True) == ["you rotten thing"]


def test_words_are_found_at_any_depth() -> None:
    deep: Any = ROT
    for _ in range(100_000):
        deep = [deep]
    assert words_of(deep) == [ROT]
    loop: dict[str, Any] = {"text": ROT}
    loop["self"] = loop
    assert words_of(loop, frozenset({"self"})) == [ROT]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Fine."}, {"type": "json", "json": {"comment": ROT}}],
        [{"type": "json", "json": {ROT: 1}}],
        '{"comment": "so r\\u006ftten"}',
    ],
    ids=str,
)
@pytest.mark.parametrize("tool_results", ["mask", "drop"])
def test_every_word_of_a_tools_result_is_screened(content: Any, tool_results: Any) -> None:
    middleware = DetoxMiddleware(scorer=ROTTEN, tool_results=tool_results)
    made = ToolMessage(content, tool_call_id="c1", name="read_note")
    result: Any = middleware.wrap_tool_call(None, lambda _: made)  # type: ignore[arg-type, return-value]
    (message,) = result.update["messages"]
    assert message.content == "[removed by the toxicity screen]"
    assert (message.tool_call_id, message.name) == ("c1", "read_note")


def test_artifacts_are_masked_and_what_is_clean_stays() -> None:
    blocks: list[Any] = [{"type": "text", "text": "Fine."}, {"type": "image", "url": "x"}]
    artifact = {"documents": [Document("So. It is rotten."), Document("Well.")], "n": 1}
    made = ToolMessage(blocks, tool_call_id="c1", artifact=artifact)
    result: Any = DetoxMiddleware(scorer=ROTTEN).wrap_tool_call(None, lambda _: made)  # type: ignore[arg-type, return-value]
    (message,) = result.update["messages"]
    assert message.content == blocks
    assert [one.page_content for one in message.artifact["documents"]] == [
        "So. [removed by the toxicity screen]", "Well.",
    ]  # fmt: skip
    assert "rotten" in artifact["documents"][0].page_content  # type: ignore[index]


class Short(BaseModel):
    """A short verdict."""

    words: str = Field(max_length=8)


@pytest.mark.parametrize("handle_errors", [True, False])
@pytest.mark.parametrize("is_async", [False, True])
async def test_an_error_that_quotes_the_answer_is_not_shown(handle_errors: Any, is_async: bool) -> None:
    said = [AIMessage("", tool_calls=call_of({"words": "all is rotten"}, "Short")),
            AIMessage("", tool_calls=call_of({"words": "fine"}, "Short", "c2"))]  # fmt: skip
    agent = create_agent(
        Foreign(messages=iter(said)), [], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=())],
        response_format=ToolStrategy(Short, handle_errors=handle_errors),
    )  # fmt: skip
    question: Any = {"messages": [HumanMessage("?")]}
    if handle_errors:
        out = await agent.ainvoke(question) if is_async else agent.invoke(question)
        assert out["structured_response"] == Short(words="fine")
        assert "rotten" not in repr(out["messages"])
        return
    with pytest.raises(GuardError) as told:
        await agent.ainvoke(question) if is_async else agent.invoke(question)
    assert "rotten" not in repr(told.value)
    assert told.value.__context__ is None
    assert told.value.__cause__ is None


def test_an_error_about_a_clean_answer_stays_itself() -> None:
    said = AIMessage("", tool_calls=call_of({"words": "far too long"}, "Short"))
    agent = create_agent(
        Foreign(messages=iter([said])), [], middleware=[DetoxMiddleware(scorer=ROTTEN)],
        response_format=ToolStrategy(Short, handle_errors=False),
    )  # fmt: skip
    with pytest.raises(StructuredOutputValidationError, match="far too long"):
        agent.invoke({"messages": [HumanMessage("?")]})


@pytest.mark.parametrize("strategy", [Verdict, ToolStrategy(Verdict), ProviderStrategy(Verdict)], ids=str)
@pytest.mark.parametrize("middleware", [[], [DetoxMiddleware(scorer=ROTTEN)]], ids=len)
def test_a_structured_answer_that_was_cut_ends_the_agent(strategy: Any, middleware: Any) -> None:
    detoxigen = ScriptedDetoxiGen(obliging)
    agent = create_agent(
        ChatDetoxiGen(detoxigen=detoxigen, max_tokens=2), [], response_format=strategy, middleware=middleware
    )
    with pytest.raises(IncompleteAnswerError, match="length"):
        agent.invoke({"messages": [HumanMessage("?")]})
    assert len(detoxigen.calls) == 1


def test_the_guards_own_scorer_and_threshold_are_the_default() -> None:
    middleware = DetoxMiddleware(guard=GuardPolicy(scorer=ROTTEN, threshold=0.2))
    assert (middleware.scorer, middleware.threshold) == (ROTTEN, 0.2)
    for bad in ({"guard": "strict"}, {"alpha": True}, {"alpha": -1}, {"threshold": 2}, {"ladder": [None]}):
        with pytest.raises(InvalidParamsError, match=next(iter(bad))):
            DetoxMiddleware(**bad)  # type: ignore[arg-type]


# -- a tool's own fields may be called as a provider's


PROVIDERS = [
    "status",
    "role",
    "type",
    "object",
    "example",
    "model",
    "id",
    "signature",
    "created_at",
    "index",
    "tool_call_id",
]


@pytest.mark.parametrize("field", PROVIDERS)
@pytest.mark.parametrize("word", ["rotten", "rotten7", "soRotten"])
def test_a_word_alone_is_read_in_calls_and_results_whatever_its_field_is_called(field: str, word: str) -> None:
    scorer = ScriptedScorer("otten")
    parsed: dict[str, Any] = {"args": {"a": [{field: word}]}, "name": "put", "id": "c1"}
    for message in (
        AIMessage("", tool_calls=[parsed]),
        AIMessage([{"type": "tool_use", "id": "c1", "name": "put", "input": {field: word}}]),
        AIMessage("", additional_kwargs={"tool_calls": [{"function": {"arguments": json.dumps({field: word})}}]}),
        AIMessage("", additional_kwargs={"parsed": {field: word}}),
        AIMessage([{"type": "non_standard", "value": {field: word}}]),
        ToolMessage("Fine.", tool_call_id="c1", artifact={field: word}),
        ToolMessage([{"type": "json", "json": {field: word}}], tool_call_id="c1"),
        ToolMessage(json.dumps({field: word}), tool_call_id="c1"),
        {field: word},
    ):
        assert any(one.flagged for one in screen(words_of(message), scorer=scorer)), message


def test_and_the_tool_does_not_get_it() -> None:
    got: list[tuple[str, str]] = []

    @tool
    def put(status: str, id: str) -> str:
        """Put it."""
        got.append((status, id))
        return "Done."

    call = {"name": "put", "args": {"status": "rotten", "id": "rotten"}, "id": "c1"}
    model = Foreign(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("Done.")]))
    create_agent(model, [put], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=())]).invoke(
        {"messages": [HumanMessage("?")]}
    )
    assert got == [("[removed by the toxicity screen]", "[removed by the toxicity screen]")]


def test_a_structured_answer_neither() -> None:
    class Parcel(BaseModel):
        status: str

    call = {"name": "Parcel", "args": {"status": "rotten"}, "id": "c1"}
    model = Foreign(messages=iter([AIMessage("", tool_calls=[call])]))
    middleware = [DetoxMiddleware(scorer=ROTTEN, ladder=())]
    agent = create_agent(model, [], middleware=middleware, response_format=ToolStrategy(Parcel))
    with pytest.raises(GuardError):
        agent.invoke({"messages": [HumanMessage("?")]})


def test_the_envelope_stays_unread() -> None:
    message = AIMessage(
        [{"type": "text", "text": "Fine.", "id": "msg_0a1b2c", "index": 0}],
        response_metadata={"model_name": "rotten", "finish_reason": "stop", "object": "completion"},
        id="run-0a1b2c",
    )
    assert set(words_of(message)) == {"Fine.", "msg", "run"}


class Noted(AgentState[Any]):
    notes: Any


@pytest.mark.parametrize(
    ("action", "notes"),
    [
        ("mask", {"by": "[removed by the toxicity screen]", "n": 3}),
        ("drop", None),
        ("mark", {"by": "rotten", "n": 3}),
        (None, {"by": "rotten", "n": 3}),
    ],
)
def test_what_a_tool_puts_into_the_state_is_screened(action: Any, notes: Any) -> None:
    @tool
    def note(tool_call_id: Annotated[str, InjectedToolCallId]) -> Command[Any]:
        """Note it."""
        told = ToolMessage("Done.", tool_call_id=tool_call_id)
        return Command(update={"notes": {"by": "rotten", "n": 3}, "messages": [told]})

    call = {"name": "note", "args": {}, "id": "c1"}
    model = Foreign(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("Done.")]))
    middleware = [DetoxMiddleware(scorer=ROTTEN, ladder=(), tool_results=action)]
    agent = create_agent(model, [note], middleware=middleware, state_schema=Noted)
    out = agent.invoke({"messages": [HumanMessage("?")]})
    assert out.get("notes") == notes
    assert [one["key"] for one in out.get("detox", ())] == ([] if action is None else ["notes"])


@pytest.mark.parametrize("form", [tuple, Overwrite])
def test_messages_of_a_command_are_screened_in_every_form(form: Any) -> None:
    middleware = DetoxMiddleware(scorer=ROTTEN)
    command = Command(update={"messages": form([ToolMessage("Fine. He is rotten.", tool_call_id="c1")])})
    update = middleware.wrap_tool_call(None, lambda _: command).update  # type: ignore[arg-type, union-attr, return-value]
    messages = update["messages"].value if form is Overwrite else update["messages"]
    assert [one.content for one in messages] == ["Fine. [removed by the toxicity screen]"]
