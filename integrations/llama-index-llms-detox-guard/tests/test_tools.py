"""Tools, structured answers and agents on a scripted model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentStream, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.detox_guard import DetoxiGenLLM
from llama_index_harness import memory, scripted

from detox_guard import InvalidParamsError


def opening(day: str) -> str:
    """When the library opens on a day."""
    return f"at nine on {day}"


def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


pytestmark = [  # of llama-index-workflows: an agent's constructor looks at every member of itself, retired ones too
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]
TOOLS = [FunctionTool.from_defaults(opening), FunctionTool.from_defaults(add)]


class Book(BaseModel):
    """A book."""

    title: str
    pages: int


BOOK = Book(title="Emma", pages=474)
PROMPT = PromptTemplate("Describe {what}.")


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_tool_call_becomes_a_block_and_never_text() -> None:
    model = scripted([call("opening", day="Monday")])
    llm = DetoxiGenLLM(detoxigen=model)
    response = llm.chat_with_tools(TOOLS, "When on Monday?")
    (selection,) = llm.get_tool_calls_from_response(response)
    assert (selection.tool_name, selection.tool_kwargs) == ("opening", {"day": "Monday"})
    assert selection.tool_id
    assert not (response.message.content or "").strip()
    offered = [tool["function"]["name"] for tool in model.calls[0].prompt.tools]
    assert offered == ["opening", "add"]
    assert json.loads(response.message.model_dump_json())["additional_kwargs"]["tool_calls"]


async def test_streamed_tool_calls_leave_no_trace_in_the_text() -> None:
    model = scripted(["Let me look. " + call("add", a=1, b=2)])
    llm = DetoxiGenLLM(detoxigen=model)
    responses = [r async for r in await llm.astream_chat_with_tools(TOOLS, "One and two?")]
    assert "".join(r.delta for r in responses).strip() == "Let me look."
    assert all("tool_call" not in (r.message.content or "") for r in responses)
    assert llm.get_tool_calls_from_response(responses[-1])[0].tool_kwargs == {"a": 1, "b": 2}


def test_a_call_that_was_cut_off_is_told() -> None:
    llm = DetoxiGenLLM(detoxigen=scripted([call("add", a=1, b=2)[:40]]))
    response = llm.chat_with_tools(TOOLS, "One and two?")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    (broken,) = response.raw["invalid_tool_calls"]
    assert broken in call("add", a=1, b=2)
    with pytest.raises(ValueError, match="add"):
        llm.get_tool_calls_from_response(response)


def test_no_tool_call() -> None:
    llm = DetoxiGenLLM(detoxigen=scripted(["At nine."]))
    response = llm.chat_with_tools(TOOLS, "When?")
    assert response.message.content == "At nine."
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="called no tool"):
        llm.get_tool_calls_from_response(response)


@pytest.mark.parametrize(
    ("kwargs", "forced", "offered"),
    [
        ({}, False, 2),
        ({"tool_required": True}, True, 2),
        ({"tool_choice": "any"}, True, 2),
        ({"tool_choice": "add"}, True, 2),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, True, 2),
        ({"tool_choice": {"type": "function", "name": "add"}}, True, 2),
        ({"tool_choice": {"type": "tool", "name": "add"}}, True, 2),
        ({"tool_choice": {"name": "add"}}, True, 2),
        ({"tool_choice": {"type": "any"}}, True, 2),
        ({"tool_choice": {"type": "required"}}, True, 2),
        ({"tool_choice": {"type": "auto"}}, False, 2),
        ({"tool_choice": {"type": "none"}}, False, 0),
        ({"tool_choice": "none"}, False, 0),
    ],
)
def test_tool_choice_decides_what_is_forced_and_offered(kwargs: dict[str, Any], forced: bool, offered: int) -> None:
    model = scripted([call("add", a=1, b=2)])
    DetoxiGenLLM(detoxigen=model).chat_with_tools(TOOLS, "One and two?", **kwargs)
    _, prompt, params = model.calls[0]
    assert (params.grammar is not None, len(prompt.tools)) == (forced, offered)


@pytest.mark.parametrize(
    "bad",
    [
        "multiply",
        {"type": "tool", "name": "multiply"},
        {"type": "tool"},
        {"type": "function", "function": "add"},
        {"type": "each", "name": "add"},
        ["add"],
        3,
    ],
)
def test_a_tool_choice_that_is_none_is_named(bad: Any) -> None:
    with pytest.raises(InvalidParamsError, match=r"tool_choice.*add"):
        DetoxiGenLLM(detoxigen=scripted()).chat_with_tools(TOOLS, "One and two?", tool_choice=bad)


@pytest.mark.parametrize(("parallel", "calls"), [(True, 2), (False, 1)])
def test_parallel_calls_only_where_allowed(parallel: bool, calls: int) -> None:
    model = scripted([call("add", a=1, b=2) + "\n" + call("add", a=3, b=4)])
    llm = DetoxiGenLLM(detoxigen=model)
    response = llm.chat_with_tools(TOOLS, "Sums?", allow_parallel_tool_calls=parallel)
    blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
    assert len(blocks) == len({block.tool_call_id for block in blocks}) == calls


async def test_predict_and_call() -> None:
    llm = DetoxiGenLLM(detoxigen=scripted([call("add", a=1, b=2)]))
    assert llm.predict_and_call(TOOLS, "One and two?").response == "3"
    assert (await llm.apredict_and_call(TOOLS, "One and two?")).response == "3"


# -- structured answers


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize("chat", [True, False])
async def test_structured_predict_decodes_under_the_schema(tools: bool, chat: bool) -> None:
    model = scripted([BOOK.model_dump_json()], tools=tools, chat=chat)
    llm = DetoxiGenLLM(detoxigen=model)
    assert llm.structured_predict(Book, PROMPT, what="Emma") == BOOK
    assert await llm.astructured_predict(Book, PROMPT, what="Emma") == BOOK
    assert list(llm.stream_structured_predict(Book, PROMPT, what="Emma"))[-1] == BOOK
    stream = await llm.astream_structured_predict(Book, PROMPT, what="Emma")
    assert [book async for book in stream][-1] == BOOK
    assert len(model.calls) == 4
    assert all(params.grammar is not None for *_, params in model.calls)


def test_a_grammar_sets_the_stops_of_the_llm_aside() -> None:
    model = scripted([BOOK.model_dump_json(), "No.", "No."])
    llm = DetoxiGenLLM(detoxigen=model, stop=[","], ignore_eos=True)
    assert llm.structured_predict(Book, PROMPT, what="Emma") == BOOK
    llm.chat([ChatMessage("Emma?")])
    assert [(params.stop, params.ignore_eos) for *_, params in model.calls] == [((), False), ((",",), True)]


def test_structured_predict_through_a_function_call() -> None:
    model = scripted([call("Book", title="Emma", pages=474)])
    llm = DetoxiGenLLM(detoxigen=model, pydantic_program_mode=PydanticProgramMode.FUNCTION)
    assert llm.structured_predict(Book, PROMPT, what="Emma") == BOOK
    assert model.calls[0].params.grammar is not None  # the call is forced


async def test_as_structured_llm() -> None:
    llm = DetoxiGenLLM(detoxigen=scripted([BOOK.model_dump_json()])).as_structured_llm(Book)
    assert llm.chat([ChatMessage("Emma?")]).raw == BOOK
    assert (await llm.acomplete("Emma?")).raw == BOOK


# -- agents


@pytest.mark.parametrize("streaming", [True, False])
async def test_function_agent(streaming: bool) -> None:
    model = scripted([call("opening", day="Monday"), "It opens at nine on Monday."])
    agent = FunctionAgent(tools=TOOLS, llm=DetoxiGenLLM(detoxigen=model), streaming=streaming)
    handler = agent.run("When does it open on Monday?", memory=memory())
    deltas = [event.delta async for event in handler.stream_events() if isinstance(event, AgentStream)]
    result = await handler
    assert str(result) == "It opens at nine on Monday."
    assert [done.tool_output.content for done in result.tool_calls] == ["at nine on Monday"]
    second = model.calls[1].prompt.messages
    assert [m["role"] for m in second[-2:]] == ["assistant", "tool"]
    assert second[-1]["tool_call_id"] == second[-2]["tool_calls"][0]["id"]
    assert "tool_call" not in "".join(deltas)


async def test_function_agent_is_forced_to_its_first_tool() -> None:
    model = scripted([call("add", a=1, b=2), "Three."])
    agent = FunctionAgent(tools=TOOLS, llm=DetoxiGenLLM(detoxigen=model), initial_tool_choice="add")
    assert str(await agent.run("One and two?", memory=memory())) == "Three."
    assert [params.grammar is not None for *_, params in model.calls] == [True, False]


async def test_react_agent_stops_before_it_invents_an_observation() -> None:
    model = scripted(
        [
            'Thought: I need a tool.\nAction: opening\nAction Input: {"day": "Monday"}\nObservation: at noon',
            "Thought: I can answer without using any more tools.\nAnswer: At nine on Monday.",
        ],
        tools=False,
    )
    agent = ReActAgent(tools=TOOLS, llm=DetoxiGenLLM(detoxigen=model))
    result = await agent.run("When does it open on Monday?", memory=memory())
    assert str(result) == "At nine on Monday."
    assert [done.tool_output.content for done in result.tool_calls] == ["at nine on Monday"]
    assert all(params.stop == ("Observation:",) for *_, params in model.calls)


@pytest.mark.parametrize("choice", ["any", "required", {"type": "any"}])
def test_a_call_cannot_be_forced_without_tools(choice: Any) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted())
    with pytest.raises(InvalidParamsError) as raised:
        llm.chat([ChatMessage("When?")], tool_choice=choice)
    assert raised.value.field == "tool_choice"
    for free in ("auto", "none", None):
        assert llm.chat([ChatMessage("When?")], tool_choice=free).message.content
