"""DetoxMiddleware in real agents, on scripted words."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from detox_guard import GuardError, GuardPolicy, InvalidParamsError, screen
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer, tool_call
from langchain.agents import AgentState, create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain.agents.structured_output import ProviderStrategy, StructuredOutputValidationError, ToolStrategy
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.runnables.base import RunnableBinding
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.types import Command, Overwrite
from pydantic import BaseModel, Field

from langchain_detox_guard import ChatDetoxiGen, DetoxMiddleware, IncompleteAnswerError
from langchain_detox_guard._words import words_of
from langchain_scripts import ROTTEN, obliging


@tool
def read_note(name: str) -> str:
    """Read a note."""
    return f"The note {name} is short. Its author is rotten. It ends here."


class Foreign(GenericFakeChatModel):
    """A chat model that is none of ours, and keeps the names of what it was told."""

    told: set[str] = Field(default_factory=set)

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self.told.update(kwargs)
        return super()._generate(*args, **kwargs)


def until(alpha: float) -> Any:
    """A model that is rude below this alpha."""

    def script(prompt: Any, params: Any) -> str:
        if prompt.messages[-1]["content"].startswith("Say the same again"):
            return "That was a poor idea."
        return "That was a fine idea." if params.alpha >= alpha else "Good morning. That was a rotten idea."

    return ScriptedDetoxiGen(script)


def run(detoxigen: ScriptedDetoxiGen, *tools: Any, **options: Any) -> dict[str, Any]:
    middleware = DetoxMiddleware(scorer=ROTTEN, **options)
    agent = create_agent(ChatDetoxiGen(detoxigen=detoxigen, seed=1), list(tools), middleware=[middleware])
    return dict(agent.invoke({"messages": [HumanMessage("What do you think?")]}))


def alphas(detoxigen: ScriptedDetoxiGen) -> list[float]:
    return [params.alpha for _, _, params in detoxigen.calls]


# -- answers


def test_a_good_answer_is_asked_for_once() -> None:
    detoxigen = until(0.0)
    out = run(detoxigen)
    assert out["messages"][-1].content == "That was a fine idea."
    assert alphas(detoxigen) == [3.0]
    assert not out.get("detox")


def test_a_score_at_the_threshold_is_not_above_it() -> None:
    detoxigen = until(9.0)
    out = run(detoxigen, threshold=0.9)
    assert "rotten" in out["messages"][-1].content
    assert alphas(detoxigen) == [3.0]


def test_alpha_is_set_in_every_call() -> None:
    detoxigen = until(0.0)
    run(detoxigen, alpha=3.5)
    assert alphas(detoxigen) == [3.5]


def test_the_ladder_raises_alpha_until_the_answer_is_good() -> None:
    detoxigen = until(9.0)
    out = run(detoxigen)
    assert alphas(detoxigen) == [3.0, 6.0, 9.0]
    assert [params.calm_share == 1 for *_, params in detoxigen.calls] == [False, True, True]
    assert out["messages"][-1].content == "That was a fine idea."
    assert [(one["action"], one["alpha"], one["rung"]) for one in out["detox"]] == [
        ("again", 3.0, 6.0), ("again", 6.0, 9.0),
    ]  # fmt: skip
    assert len(out["messages"]) == 2


def test_then_it_asks_for_a_kinder_text() -> None:
    detoxigen = until(99)
    out = run(detoxigen)
    assert out["messages"][-1].content == "That was a poor idea."
    assert [one["action"] for one in out["detox"]] == ["again", "again", "rewrite"]
    assert [message["role"] for message in detoxigen.calls[-1][1].messages] == ["user", "assistant", "user"]
    assert "rotten" not in str(out["detox"])


@pytest.mark.parametrize(
    ("on_exhausted", "text"),
    [("mask", "Good morning. [removed by the toxicity screen]"), ("replace", "I would rather not say that.")],
)
def test_then_it_masks_or_replaces(on_exhausted: Any, text: str) -> None:
    out = run(until(99), ladder=(3.0,), on_exhausted=on_exhausted)
    assert out["messages"][-1].content == text
    assert [one["action"] for one in out["detox"]] == ["again", on_exhausted]


def test_or_raises() -> None:
    with pytest.raises(GuardError, match=r"0\.90"):
        run(until(99), ladder=(), on_exhausted="raise")


async def test_async_does_the_same() -> None:
    detoxigen = until(9.0)
    agent = create_agent(ChatDetoxiGen(detoxigen=detoxigen, seed=1), [], middleware=[DetoxMiddleware(scorer=ROTTEN)])
    out = await agent.ainvoke({"messages": [HumanMessage("Well?")]})
    assert out["messages"][-1].content == "That was a fine idea."
    assert alphas(detoxigen) == [3.0, 6.0, 9.0]


@pytest.mark.parametrize("is_async", [False, True])
async def test_no_rejected_draft_is_streamed(is_async: bool) -> None:
    agent = create_agent(ChatDetoxiGen(detoxigen=until(5.0), seed=1), [], middleware=[DetoxMiddleware(scorer=ROTTEN)])
    question: Any = {"messages": [HumanMessage("Well?")]}
    if is_async:
        streamed = [message async for message, _ in agent.astream(question, stream_mode="messages")]
    else:
        streamed = [message for message, _ in agent.stream(question, stream_mode="messages")]
    assert "".join(str(message.content) for message in streamed) == "That was a fine idea."


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    "around",
    [
        lambda model: model.with_config(tags=["mine"]),
        lambda model: model.with_config(tags=["mine"]).with_retry(),
        lambda model: model.with_fallbacks([model]).with_config(tags=["mine"]),
        lambda model: model.with_listeners().with_config(tags=["mine"], metadata={"a": 1}),
    ],
)
async def test_nor_of_a_model_with_tags_of_its_own(around: Any, foreign: bool, is_async: bool) -> None:
    ours = ChatDetoxiGen(detoxigen=until(99), seed=1)
    model = Foreign(messages=iter([AIMessage("That was a rotten idea.")])) if foreign else ours
    agent = create_agent(
        around(model), [], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=(), on_exhausted="replace")]
    )
    question: Any = {"messages": [HumanMessage("Well?")]}
    if is_async:
        streamed = [message async for message, _ in agent.astream(question, stream_mode="messages")]
    else:
        streamed = [message for message, _ in agent.stream(question, stream_mode="messages")]
    assert "".join(str(message.content) for message in streamed) == "I would rather not say that."


def test_with_a_decoding_guard_text_streams_on() -> None:
    """The policy goes down to the decoder, which releases only what was scored; nothing is held back here."""
    detoxigen = until(0.0)
    policy = GuardPolicy(scorer=ROTTEN)
    middleware = DetoxMiddleware(guard=policy, alpha=3.0, scorer=ROTTEN)
    agent = create_agent(ChatDetoxiGen(detoxigen=detoxigen, seed=1), [], middleware=[middleware])
    streamed = [m for m, _ in agent.stream({"messages": [HumanMessage("Well?")]}, stream_mode="messages")]
    assert len(streamed) > 1
    assert (detoxigen.calls[-1][2].guard, detoxigen.calls[-1][2].alpha) == (policy, 3.0)


def test_any_chat_model_is_checked_without_alphas() -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("What a rotten idea."), AIMessage("What an idea.")]))
    out = create_agent(model, [], middleware=[DetoxMiddleware(scorer=ROTTEN)]).invoke({"messages": [HumanMessage("?")]})
    assert out["messages"][-1].content == "What an idea."
    assert [one["action"] for one in out["detox"]] == ["rewrite"]


class Swap(AgentMiddleware[Any, Any, Any]):
    """Another middleware, behind ours, that takes another model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return handler(request.override(model=self.model))


@pytest.mark.parametrize("guard", [None, GuardPolicy(scorer=ROTTEN)])
def test_whoever_answers_is_checked(guard: GuardPolicy | None) -> None:
    """A model that came in behind the middleware is told nothing that it does not know, and not believed."""
    other = Foreign(messages=iter([AIMessage("What a rotten idea."), AIMessage("What an idea.")]))
    detoxigen = until(0.0)
    middleware = [DetoxMiddleware(scorer=ROTTEN, guard=guard, alpha=4.0, ladder=["rewrite"]), Swap(other)]
    agent = create_agent(ChatDetoxiGen(detoxigen=detoxigen, seed=1), [], middleware=middleware)
    out = agent.invoke({"messages": [HumanMessage("?")]})
    assert out["messages"][-1].content == "What an idea."
    assert [one["action"] for one in out["detox"]] == ["rewrite"]
    assert not detoxigen.calls
    assert not other.told & {"alpha", "guard", "calm_share"}


@pytest.mark.parametrize(
    ("other", "believed"),
    [
        (GuardPolicy(scorer=ROTTEN, threshold=0.95), False),
        (GuardPolicy(scorer=ScriptedScorer("another")), False),
        (GuardPolicy(scorer=ROTTEN, ladder=(), replacement="rotten"), False),
        (GuardPolicy(scorer=ROTTEN, on_event=print), True),
    ],
)
def test_an_answer_is_believed_only_under_the_same_guard(other: GuardPolicy, believed: bool) -> None:
    """It says that it was guarded, and its scorer has the same name."""
    behind = ChatDetoxiGen(detoxigen=ScriptedDetoxiGen(["What a rotten idea."]), guard=other)
    first = ChatDetoxiGen(detoxigen=ScriptedDetoxiGen(["Fine."]))
    strict = DetoxMiddleware(guard=GuardPolicy(scorer=ROTTEN), ladder=(), on_exhausted="replace")
    out = create_agent(first, [], middleware=[strict, Swap(behind)]).invoke({"messages": [HumanMessage("?")]})
    assert "rotten" not in out["messages"][-1].content
    assert [one["action"] for one in out["detox"]] == ["guard" if believed else "replace"]


def test_drafts_of_a_model_that_came_in_behind_are_not_streamed() -> None:
    other = ChatDetoxiGen(detoxigen=until(99), seed=1)
    middleware = [DetoxMiddleware(scorer=ROTTEN, ladder=[9.0]), Swap(other)]
    agent = create_agent(ChatDetoxiGen(detoxigen=until(0.0), seed=1), [], middleware=middleware)
    streamed = [m for m, _ in agent.stream({"messages": [HumanMessage("Well?")]}, stream_mode="messages")]
    assert "".join(str(one.content) for one in streamed) == "Good morning. [removed by the toxicity screen]"


def test_the_ladder_never_lowers_alpha() -> None:
    detoxigen = until(99)
    run(detoxigen, alpha=8.0)
    assert alphas(detoxigen) == [8.0, 8.0, 9.0, 8.0]


def test_nor_one_that_is_bound_outside_of_a_wrapper() -> None:
    detoxigen = until(99)
    model = ChatDetoxiGen(detoxigen=detoxigen, seed=1).with_retry().bind(alpha=8.0)
    agent = create_agent(model, [], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=(6.0,))])
    agent.invoke({"messages": [HumanMessage("?")]})
    assert alphas(detoxigen) == [8.0, 8.0]


@pytest.mark.parametrize(
    "said",
    [
        AIMessage([{"type": "reasoning", "reasoning": "He is rotten."}, {"type": "text", "text": "Fine."}]),
        AIMessage([{"type": "non_standard", "value": {"type": "thinking", "thinking": "So rotten."}}, "Fine."]),
        AIMessage("Fine.", additional_kwargs={"reasoning_content": "He is rotten."}),
    ],
)
def test_reasoning_is_checked_too(said: AIMessage) -> None:
    agent = create_agent(Foreign(messages=iter([said])), [], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=())])
    out = agent.invoke({"messages": [HumanMessage("?")]})
    assert out["detox"]
    assert out["messages"][-1].content == "Fine."
    assert "otten" not in str(out["messages"][-1])


def test_masked_calls_are_masked_in_every_form() -> None:
    args = {"name": "rotten"}
    blocks: list[Any] = ["Fine.", {"type": "tool_use", "id": "c1", "name": "read_note", "input": args}]
    call = AIMessage(
        blocks,
        tool_calls=[{"name": "read_note", "args": args, "id": "c1"}],
        additional_kwargs={"tool_calls": [{"function": {"name": "read_note", "arguments": '{"name": "rotten"}'}}]},
    )
    model = Foreign(messages=iter([call, AIMessage("Done.")]))
    out = create_agent(model, [read_note], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=())]).invoke(
        {"messages": [HumanMessage("?")]}
    )
    assert "rotten" not in str(out["messages"][1])
    assert out["messages"][1].content == "Fine."
    assert out["messages"][1].tool_calls[0]["name"] == "read_note"


# -- tools


def calling(name: str, arguments: dict[str, Any]) -> ScriptedDetoxiGen:
    """A model that calls the tool once, then answers."""

    def script(prompt: Any, params: Any) -> str:
        done = any(message["role"] == "tool" for message in prompt.messages)
        return "Here you are." if done else tool_call(name, **arguments)

    return ScriptedDetoxiGen(script)


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


class Verdict(BaseModel):
    """A verdict."""

    words: str


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


# -- the model inside


def wrapped(chat: ChatDetoxiGen) -> dict[str, Any]:
    """The model in what LangChain puts around one, some of it against the middleware."""
    field = ConfigurableField(id="guard")
    return {
        "bind": chat.bind(seed=3),
        "bound guard": RunnableBinding(bound=chat, kwargs={"guard": None, "alpha": 0.0}),
        "config": chat.with_config(tags=["t"]),
        "retry": chat.with_retry(),
        "fallbacks": chat.with_fallbacks([chat]),
        "fields": chat.configurable_fields(guard=field),
        "alternatives": chat.configurable_alternatives(ConfigurableField(id="which"), other=lambda: chat),
        "all": chat.bind(seed=3).with_config(tags=["t"]).with_retry().with_fallbacks([chat.with_retry()]),
    }


@pytest.mark.parametrize("around", list(wrapped(ChatDetoxiGen())))
def test_the_guard_and_alpha_reach_the_model_inside(around: str) -> None:
    detoxigen = until(0.0)
    model = wrapped(ChatDetoxiGen(detoxigen=detoxigen, seed=1))[around]
    policy = GuardPolicy(scorer=ROTTEN)
    agent = create_agent(model, [], middleware=[DetoxMiddleware(guard=policy, alpha=2.0)])
    config: Any = {"configurable": {"guard": None, "which": "other"}}
    streamed = [m for m, _ in agent.stream({"messages": [HumanMessage("?")]}, config, stream_mode="messages")]
    assert [(params.guard, params.alpha) for *_, params in detoxigen.calls] == [(policy, 2.0)]
    assert around == "retry" or len(streamed) > 1


def test_what_is_bound_stays_under_tools() -> None:
    detoxigen = calling("read_note", {"name": "one"})
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1).with_config(tags=["t"]).bind(seed=5, top_p=0.5)
    create_agent(chat, [read_note], middleware=[DetoxMiddleware(scorer=ROTTEN, alpha=2.0)]).invoke(
        {"messages": [HumanMessage("Read it.")]}
    )
    assert [(p.alpha, p.seed, p.top_p) for *_, p in detoxigen.calls] == [(2.0, 5, 0.5)] * 2


def test_the_ladder_climbs_inside_and_never_lowers_what_was_bound() -> None:
    detoxigen = until(99)
    model = ChatDetoxiGen(detoxigen=detoxigen, seed=1).bind(alpha=7.0).with_config(tags=["t"])
    create_agent(model, [], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=(6.0, 9.0))]).invoke(
        {"messages": [HumanMessage("?")]}
    )
    assert alphas(detoxigen) == [7.0, 7.0, 9.0]


def test_a_foreign_fallback_or_a_step_behind_the_model_is_not_believed() -> None:
    """The whole is held back and checked by the guard's own scorer."""
    chat = ChatDetoxiGen(detoxigen=until(99), seed=1)
    other = Foreign(messages=iter([]))
    for model in (chat.with_fallbacks([other]), chat | RunnableLambda(lambda message: message)):
        agent = create_agent(model, [], middleware=[DetoxMiddleware(guard=GuardPolicy(scorer=ROTTEN), ladder=())])
        streamed = [m for m, _ in agent.stream({"messages": [HumanMessage("?")]}, stream_mode="messages")]
        assert "rotten" not in "".join(str(one.content) for one in streamed)


@pytest.mark.parametrize("given", [{"alpha": 2.0}, {"guard": GuardPolicy(scorer=ROTTEN)}])
def test_what_cannot_be_looked_into_is_refused(given: Any) -> None:
    chat = ChatDetoxiGen(detoxigen=until(99), seed=1)
    model: Any = RunnableLambda(lambda messages: chat.invoke(messages))
    agent = create_agent(model, [], middleware=[DetoxMiddleware(**given)])
    with pytest.raises(InvalidParamsError, match="RunnableLambda"):
        agent.invoke({"messages": [HumanMessage("?")]})
    agent = create_agent(model, [], middleware=[DetoxMiddleware(scorer=ROTTEN, ladder=())])
    assert "rotten" not in agent.invoke({"messages": [HumanMessage("?")]})["messages"][-1].text


def test_settings_of_another_middleware_do_not_undo_ours() -> None:
    class Undo(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request.override(model_settings={"guard": None, "alpha": 0.0, "seed": 8}))

    detoxigen, policy = until(0.0), GuardPolicy(scorer=ROTTEN)
    middleware = [Undo(), DetoxMiddleware(guard=policy, alpha=2.0)]
    create_agent(ChatDetoxiGen(detoxigen=detoxigen), [], middleware=middleware).invoke(
        {"messages": [HumanMessage("?")]}
    )
    assert (detoxigen.calls[0][2].guard, detoxigen.calls[0][2].alpha, detoxigen.calls[0][2].seed) == (policy, 2.0, 8)


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
