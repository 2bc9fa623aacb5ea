"""What is bound stays in force in everything that LangChain puts around a model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from detox_guard import InvalidParamsError
from detox_guard.testing import ScriptedDetoxiGen
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import ConfigurableField
from langchain_core.runnables.base import RunnableBinding

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM
from langchain_scripts import POLICY, Town, asked, look_up, obliging

# -- what LangChain puts around a model


def test_what_was_bound_is_kept_by_what_is_bound_next(detoxigen: ScriptedDetoxiGen) -> None:
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1)
    bound = chat.bind(alpha=1.5).bind(guard=POLICY).with_config(tags=["t"]).bind(seed=9)
    for one in (bound, bound.bind_tools([look_up]), bound.with_structured_output(Town)):
        one.invoke("Hi")
        assert (asked(detoxigen).alpha, asked(detoxigen).guard, asked(detoxigen).seed) == (1.5, POLICY, 9)
    assert bound.bind_tools([look_up]).config["tags"] == ["t"]
    assert bound.bind_tools([look_up]).invoke("Hi").tool_calls
    assert chat.with_config(tags=["t"]).bind(alpha=0.5).bind(alpha=2.5).bound.alpha == 2.5
    plain = DetoxiGenLLM(detoxigen=detoxigen).bind(alpha=1.5, stop=["you"]).bind(seed=3)
    assert plain.invoke("Hi").startswith("Hello, dear reader!")
    assert (asked(detoxigen).alpha, asked(detoxigen).stop, asked(detoxigen).seed) == (1.5, ("you",), 3)


AROUND: dict[str, Any] = {
    "fields": lambda chat: chat.configurable_fields(alpha=ConfigurableField(id="alpha")),
    "alternatives": lambda chat: chat.configurable_alternatives(ConfigurableField(id="which"), other=chat),
    "fallbacks": lambda chat: chat.with_fallbacks([chat]),
    "types": lambda chat: chat.with_types(input_type=str),
    "listeners": lambda chat: chat.with_listeners(),
    "config": lambda chat: chat.with_config(tags=["t"]),
}


@pytest.mark.parametrize("outer", AROUND)
@pytest.mark.parametrize("inner", AROUND)
def test_what_is_bound_to_a_wrapper_is_kept_under_tools_and_schemas(
    inner: str, outer: str, detoxigen: ScriptedDetoxiGen
) -> None:
    chat: Any = AROUND[inner](ChatDetoxiGen(detoxigen=detoxigen, alpha=1.5))
    if outer == "fields":
        outer = "config"  # LangChain looks for the fields in the wrapper itself
    model = AROUND[outer](chat.bind(top_p=0.5)).bind(guard=POLICY, seed=5)
    agent = create_agent(model, tools=[look_up])
    for ask in (
        model.bind_tools([look_up]).invoke,
        model.with_structured_output(Town).invoke,
        model.with_structured_output(Town, include_raw=True).invoke,
        lambda said: agent.invoke({"messages": [HumanMessage(said)]}, {"recursion_limit": 5}),
    ):
        ask("Hi")
        told = asked(detoxigen)
        assert (told.alpha, told.top_p, told.guard, told.seed) == (1.5, 0.5, POLICY, 5)
    assert model.bind_tools([look_up]).invoke("Hi").tool_calls


def test_a_retried_model_takes_all_that_another_does(detoxigen: ScriptedDetoxiGen) -> None:
    chat: Any = ChatDetoxiGen(detoxigen=detoxigen)
    for model in (
        chat.bind(seed=5).with_retry().bind(guard=POLICY),
        chat.with_retry().with_config(tags=["t"]).bind(seed=5, guard=POLICY),
        chat.with_fallbacks([chat]).with_retry().bind(seed=5).with_retry().bind(guard=POLICY),
    ):
        agent = create_agent(model, tools=[look_up])
        for ask in (
            model.invoke,
            model.bind_tools([look_up]).invoke,
            model.with_structured_output(Town).invoke,
            lambda said, agent=agent: agent.invoke({"messages": [HumanMessage(said)]}, {"recursion_limit": 5}),
        ):
            ask("Hi")
            assert (asked(detoxigen).guard, asked(detoxigen).seed) == (POLICY, 5)
    plain = DetoxiGenLLM(detoxigen=detoxigen).bind(seed=5).with_retry().bind(alpha=1.5)
    assert plain.invoke("Hi")
    assert (asked(detoxigen).alpha, asked(detoxigen).seed) == (1.5, 5)


def test_a_retried_model_is_retried_under_tools(detoxigen: ScriptedDetoxiGen) -> None:
    failed: list[int] = []

    def script(*args: Any) -> str:
        if len(failed) < 2:
            failed.append(1)
            raise RuntimeError("not yet")
        return obliging(*args)

    chat: Any = ChatDetoxiGen(detoxigen=ScriptedDetoxiGen(script))
    model = chat.bind(seed=1).with_retry(wait_exponential_jitter=False, stop_after_attempt=3)
    assert model.bind_tools([look_up]).invoke("Hi").tool_calls
    assert len(failed) == 2


@pytest.mark.parametrize("raw", [False, True])
async def test_a_structured_answer_takes_options_of_its_call(raw: bool, detoxigen: ScriptedDetoxiGen) -> None:
    model = ChatDetoxiGen(detoxigen=detoxigen).with_structured_output(Town, include_raw=raw)
    own: dict[str, Any] = {"alpha": 8.0, "guard": POLICY}
    ways: list[Any] = [
        lambda: model.bind(**own).invoke("Hi"),
        lambda: model.invoke("Hi", **own),
        lambda: model.batch(["Hi"], **own),
        lambda: list(model.stream("Hi", **own)),
    ]
    for way in ways:
        way()
        assert (asked(detoxigen).alpha, asked(detoxigen).guard) == (8.0, POLICY)
    await model.ainvoke("Hi", alpha=7.0)
    assert asked(detoxigen).alpha == 7.0
    _ = [chunk async for chunk in model.astream("Hi", alpha=6.0)]
    assert asked(detoxigen).alpha == 6.0
    with pytest.raises(InvalidParamsError, match="apha"):
        model.invoke("Hi", apha=1.0)


def test_fallbacks_take_tools_and_schemas(detoxigen: ScriptedDetoxiGen) -> None:
    model: Any = ChatDetoxiGen(detoxigen=detoxigen, guard=POLICY).with_fallbacks(
        [ChatDetoxiGen(detoxigen=detoxigen, seed=2)]
    )
    assert model.bind_tools([look_up]).invoke("Hi").tool_calls
    assert model.with_structured_output(Town).invoke("Hi") == Town(name="some name")
    assert asked(detoxigen).guard == POLICY
    assert model.get_num_tokens_from_messages([HumanMessage("Hi")])


def test_configurable_models_stay_so_under_tools_and_schemas(detoxigen: ScriptedDetoxiGen) -> None:
    model: Any = ChatDetoxiGen(detoxigen=detoxigen, seed=1, guard=POLICY).configurable_fields(
        alpha=ConfigurableField(id="alpha")
    )
    config: Any = {"configurable": {"alpha": 7.0}}
    for one in (model, model.bind_tools([look_up]), model.with_structured_output(Town)):
        one.invoke("Hi", config)
        assert (asked(detoxigen).alpha, asked(detoxigen).guard) == (7.0, POLICY)
    with pytest.raises(InvalidParamsError, match="alpha"):
        model.invoke("Hi", {"configurable": {"alpha": "much"}})
    model = ChatDetoxiGen(detoxigen=detoxigen).configurable_alternatives(
        ConfigurableField(id="which"),
        strong=ChatDetoxiGen(detoxigen=detoxigen, alpha=8.0),
        late=lambda: ChatDetoxiGen(detoxigen=detoxigen, alpha=9.0),
        other=GenericFakeChatModel(messages=iter([AIMessage("Foreign.")])),
    )
    assert model.invoke("Hi", {"configurable": {"which": "other"}}).content == "Foreign."
    tools = ChatDetoxiGen(detoxigen=detoxigen).configurable_alternatives(
        ConfigurableField(id="which"), late=lambda: ChatDetoxiGen(detoxigen=detoxigen, alpha=9.0)
    )
    for which, alpha in {"default": 3.0, "late": 9.0}.items():
        assert tools.bind_tools([look_up]).invoke("Hi", {"configurable": {"which": which}}).tool_calls  # type: ignore[attr-defined]
        assert asked(detoxigen).alpha == alpha


def test_what_is_bound_survives_serialization() -> None:
    bound = ChatDetoxiGen(model="some/model").bind(alpha=1.5, guard=POLICY).with_config(tags=["t"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load(
            dumpd(bound),
            valid_namespaces=["langchain_detox_guard"],
            allowed_objects=[ChatDetoxiGen, RunnableBinding],
        )
    assert again.bound == ChatDetoxiGen(model="some/model", alpha=1.5, guard=POLICY)
    assert again.config["tags"] == ["t"]
