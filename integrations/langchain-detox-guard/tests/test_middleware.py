"""DetoxMiddleware in real agents: answers, and the model inside."""

from __future__ import annotations

from typing import Any

import pytest
from detox_guard import GuardError, GuardPolicy, InvalidParamsError
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.runnables.base import RunnableBinding

from agent_scripts import Foreign, alphas, calling, read_note, run, until
from langchain_detox_guard import ChatDetoxiGen, DetoxMiddleware
from langchain_scripts import ROTTEN

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


async def streamed(agent: Any, is_async: bool) -> list[Any]:
    """The messages, piece by piece."""
    question = {"messages": [HumanMessage("Well?")]}
    if is_async:
        return [message async for message, _ in agent.astream(question, stream_mode="messages")]
    return [message for message, _ in agent.stream(question, stream_mode="messages")]


@pytest.mark.parametrize("is_async", [False, True])
async def test_no_rejected_draft_is_streamed(is_async: bool) -> None:
    agent = create_agent(ChatDetoxiGen(detoxigen=until(5.0), seed=1), [], middleware=[DetoxMiddleware(scorer=ROTTEN)])
    told = await streamed(agent, is_async)
    assert "".join(str(message.content) for message in told) == "That was a fine idea."


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
    assert (
        "".join(str(message.content) for message in await streamed(agent, is_async)) == "I would rather not say that."
    )


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
