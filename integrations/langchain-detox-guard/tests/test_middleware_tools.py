"""DetoxMiddleware: what tools give, and what the model tells them."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from detox_guard import GuardError, InvalidParamsError
from detox_guard.testing import ScriptedDetoxiGen, tool_call
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.types import Command

from agent_scripts import Verdict, calling, read_note, run
from langchain_detox_guard import ChatDetoxiGen, DetoxMiddleware
from langchain_scripts import ROTTEN


@pytest.mark.parametrize(
    ("tool_results", "content"),
    [
        ("mask", "The note one is short. [removed by the toxicity screen] It ends here."),
        ("drop", "[removed by the toxicity screen]"),
        ("mark", "The note one is short. Its author is rotten. It ends here."),
        (None, "The note one is short. Its author is rotten. It ends here."),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_tool_results_are_screened_before_the_model_reads_them(
    tool_results: Any, content: str, is_async: bool
) -> None:
    detoxigen = calling("read_note", {"name": "one"})
    middleware = DetoxMiddleware(scorer=ROTTEN, tool_results=tool_results)
    agent = create_agent(ChatDetoxiGen(detoxigen=detoxigen, seed=1), [read_note], middleware=[middleware])
    question: Any = {"messages": [HumanMessage("Read it.")]}
    out = await agent.ainvoke(question) if is_async else agent.invoke(question)
    assert detoxigen.calls[-1][1].messages[-1]["content"] == content
    (message,) = [one for one in out["messages"] if isinstance(one, ToolMessage)]
    assert message.content == content
    records = out.get("detox", [])
    assert [(one["where"], one["tool"], one["action"]) for one in records] == (
        [("tool", "read_note", tool_results)] if tool_results else []
    )


@tool
def read_shelf(name: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> Any:
    """Read several things at once."""
    result = ToolMessage("It is rotten.", tool_call_id=tool_call_id, name="read_shelf")
    return [result, Command(update={"messages": [HumanMessage("So rotten. The end.")]})]


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_tool_may_return_a_list(is_async: bool) -> None:
    """LangGraph's tools may; every message in it is read by the model, whatever its role."""
    detoxigen = calling("read_shelf", {"name": "one"})
    agent = create_agent(
        ChatDetoxiGen(detoxigen=detoxigen, seed=1), [read_shelf], middleware=[DetoxMiddleware(scorer=ROTTEN)]
    )
    question: Any = {"messages": [HumanMessage("Read it.")]}
    out = await agent.ainvoke(question) if is_async else agent.invoke(question)
    assert "rotten" not in str(detoxigen.calls[-1][1].messages)
    assert len(out["detox"]) == 2


def test_messages_of_a_command_may_have_any_form() -> None:
    @tool
    def read_all(name: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> Any:
        """Read."""
        result = {"role": "tool", "content": "It is rotten.", "tool_call_id": tool_call_id}
        return Command(update={"messages": [result, ("user", "So rotten."), "All rotten."]})

    detoxigen = calling("read_all", {"name": "one"})
    out = run(detoxigen, read_all)
    assert "otten" not in str(detoxigen.calls[-1][1].messages) + str([one.content for one in out["messages"]])
    assert len(out["detox"]) == 3


def test_records_add_up_over_steps_and_parallel_calls() -> None:
    def script(prompt: Any, params: Any) -> str:
        done = any(message["role"] == "tool" for message in prompt.messages)
        return "A rotten end." if done else tool_call("read_note", name="a") + tool_call("read_note", name="b")

    out = run(ScriptedDetoxiGen(script), read_note, ladder=())
    assert [one["where"] for one in out["detox"]] == ["tool", "tool", "answer"]


def test_a_tools_own_command_is_screened_too() -> None:
    @tool
    def noted(name: str) -> Command[Any]:
        """Read and note."""
        message = ToolMessage("It is rotten.", tool_call_id="c1", name="noted")
        return Command(update={"messages": [message]})

    middleware = DetoxMiddleware(scorer=ROTTEN)
    result = middleware.wrap_tool_call(None, lambda _: noted.func("x"))  # type: ignore[arg-type]
    assert isinstance(result, Command)
    assert isinstance(result.update, dict)
    assert "rotten" not in result.update["messages"][0].content
    assert len(result.update["detox"]) == 1


def test_calls_stay_calls_when_their_arguments_are_masked() -> None:
    detoxigen = calling("read_note", {"name": "rotten"})
    out = run(detoxigen, read_note, ladder=())
    call = out["messages"][1].tool_calls[0]
    assert call["name"] == "read_note"
    assert "rotten" not in str(call["args"])
    assert out["messages"][-1].content == "Here you are."
    assert out["detox"][0]["action"] == "mask"


@pytest.mark.parametrize("words", ["fine", "rotten"])
def test_a_structured_answer_is_checked(words: str) -> None:
    detoxigen = ScriptedDetoxiGen(lambda *_: tool_call("Verdict", words=words))
    agent = create_agent(
        ChatDetoxiGen(detoxigen=detoxigen, seed=1), [], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=())],
        response_format=ToolStrategy(Verdict),
    )  # fmt: skip
    if words == "rotten":
        with pytest.raises(GuardError):
            agent.invoke({"messages": [HumanMessage("?")]})
    else:
        assert agent.invoke({"messages": [HumanMessage("?")]})["structured_response"] == Verdict(words="fine")


def test_a_schema_is_one_more_tool_to_an_agent() -> None:
    detoxigen = ScriptedDetoxiGen(lambda *_: tool_call("Verdict", words="fine"))
    agent = create_agent(ChatDetoxiGen(detoxigen=detoxigen, seed=1), [read_note], response_format=Verdict)
    assert agent.invoke({"messages": [HumanMessage("?")]})["structured_response"] == Verdict(words="fine")
    assert detoxigen.calls[-1][2].grammar is not None
    assert len(detoxigen.calls[-1][1].tools) == 2


@pytest.mark.parametrize(
    "bad",
    [{"tool_results": "hide"}, {"on_exhausted": "stop"}, {"ladder": [-1.0]}, {"ladder": ["louder"]}, {"threshold": 2}],
)
def test_bad_options_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))):
        DetoxMiddleware(**{"scorer": ROTTEN, **bad})
