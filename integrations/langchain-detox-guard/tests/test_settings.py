"""What was configured stays so, or the way there is refused by name."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Annotated, Any

import pytest
from detox_guard import DecodingParams, EngineBusyError, GuardPolicy, InvalidParamsError, PromptTooLongError
from detox_guard.errors import NotPicklableError
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer
from langchain.agents import create_agent
from langchain_core import exceptions
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField
from langchain_core.runnables.base import RunnableBinding
from langchain_core.tools import tool
from pydantic import BaseModel, TypeAdapter

from langchain_detox_guard import ChatDetoxiGen, DetoxDocumentScreen, DetoxiGenLLM, DetoxMiddleware, DetoxRetriever
from langchain_detox_guard._errors import as_langchain
from langchain_scripts import ROTTEN, obliging

BOTH = pytest.mark.parametrize("kind", [ChatDetoxiGen, DetoxiGenLLM])
NAMES = {"max_new_tokens": "max_tokens"}
POLICY = GuardPolicy(threshold=0.3, ladder=(2.5,))  # type: ignore[arg-type]


class Town(BaseModel):
    """A town."""

    name: str


@tool
def look_up(town: str) -> str:
    """Look it up."""
    return "nothing"


def asked(detoxigen: ScriptedDetoxiGen) -> DecodingParams:
    return detoxigen.calls[-1][2]


# -- copies


@BOTH
def test_a_deep_copy_shares_what_belongs_to_the_process(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    policy = GuardPolicy(scorer=ROTTEN)
    limiter, cache = InMemoryRateLimiter(), InMemoryCache()
    limits = {"rate_limiter": limiter} if kind is ChatDetoxiGen else {}
    llm = kind(detoxigen=detoxigen, guard=policy, cache=cache, stop=["x"], metadata={"a": [1]}, **limits)
    for twin in (copy.deepcopy(llm), llm.model_copy(deep=True), copy.deepcopy([llm])[0], copy.copy(llm)):
        assert twin.detoxigen is detoxigen
        assert twin.guard.scorer is policy.scorer
        assert twin.cache is cache
        assert twin == llm
        assert getattr(twin, "rate_limiter", limiter) is limiter
    twin = copy.deepcopy(llm)
    twin.stop.append("y")
    twin.metadata["a"].append(2)
    assert (llm.stop, llm.metadata) == (["x"], {"a": [1]})


@BOTH
def test_a_changed_copy_is_checked_and_keeps_the_rest(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    llm = kind(detoxigen=detoxigen, guard=POLICY, seed=4, tags=["t"])
    other = llm.model_copy(update={"alpha": 1.5, "guard": {"threshold": 0.2}})
    assert (other.alpha, other.guard, other.seed, other.detoxigen) == (1.5, GuardPolicy(threshold=0.2), 4, detoxigen)
    assert (other.tags, llm.alpha, llm.guard) == (["t"], 3.0, POLICY)
    for field, value in {"alpha": -1, "guard": "strict", "top_k": True, "stop": [3], "model": "other/model"}.items():
        with pytest.raises(InvalidParamsError, match=field):
            llm.model_copy(update={field: value})
    with pytest.raises(InvalidParamsError, match="apha"):
        llm.model_copy(update={"apha": 1.0})


@BOTH
def test_a_dump_holds_the_engine_or_fails(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    llm = kind(detoxigen=detoxigen, guard=POLICY)
    assert kind(**llm.model_dump(exclude={"profile"})).detoxigen is detoxigen
    with pytest.raises(ValueError, match="serialize"):
        llm.model_dump_json()


# -- pickles


def around(model: Any) -> list[Any]:
    """The model in everything that LangChain puts around one."""
    return [
        model,
        model.bind(top_p=0.5),
        model.with_config(tags=["t"]),
        model.with_retry(),
        model.with_fallbacks([model]),
        model.configurable_fields(alpha=ConfigurableField(id="alpha")),
        model.configurable_alternatives(ConfigurableField(id="which"), other=model),
    ]


@BOTH
def test_a_pickle_keeps_everything(kind: Any) -> None:
    own = {"chat_template_kwargs": {"thinking": False}} if kind is ChatDetoxiGen else {}
    llm = kind(model="some/model", alpha=1.5, guard=POLICY, stop=["x"], tags=["t"], metadata={"m": 1}, **own)
    for one in around(llm):
        again = pickle.loads(pickle.dumps(one))
        assert again == one
    assert pickle.loads(pickle.dumps(llm)).guard == POLICY


@BOTH
@pytest.mark.parametrize("given", ["detoxigen", "scorer", "hook", "cache"])
def test_or_is_refused_by_name(kind: Any, given: str) -> None:
    fields: Any = {
        "detoxigen": {"detoxigen": ScriptedDetoxiGen(obliging)},
        "scorer": {"guard": GuardPolicy(scorer=ROTTEN)},
        "hook": {"guard": GuardPolicy(on_event=lambda _: None)},
        "cache": {"cache": Unpicklable()},
    }[given]
    for one in around(kind(**fields)):
        with pytest.raises(NotPicklableError):
            pickle.dumps(one)


class Unpicklable(InMemoryCache):
    """A cache that holds a connection, say."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = lambda: None


@pytest.mark.parametrize("guarded", [False, True])
def test_screens_and_middleware_alike(guarded: bool) -> None:
    scorer = ROTTEN
    parts: list[Any] = [DetoxDocumentScreen(scorer=scorer), DetoxMiddleware(scorer=scorer)]
    parts.append(DetoxMiddleware(guard=GuardPolicy(scorer=scorer)) if guarded else DetoxMiddleware(scorer=scorer))
    for part in parts:
        assert copy.deepcopy(part).scorer is scorer
        with pytest.raises(NotPicklableError):
            pickle.dumps(part)
    screen = DetoxDocumentScreen(action="drop", threshold=0.25)
    assert pickle.loads(pickle.dumps(screen)) == screen
    middleware = pickle.loads(pickle.dumps(DetoxMiddleware(guard=POLICY, alpha=2.0)))
    assert (middleware.guard, middleware.alpha) == (POLICY, 2.0)
    with pytest.raises(InvalidParamsError, match="action"):
        screen.model_copy(update={"action": "hide"})


def test_a_screen_inside_a_retriever_too() -> None:
    screen = DetoxDocumentScreen(scorer=ROTTEN)
    retriever = DetoxRetriever(retriever=DetoxRetriever.model_construct(), screen=screen)
    assert copy.deepcopy(retriever).screen.scorer is screen.scorer
    with pytest.raises(NotPicklableError):
        pickle.dumps(retriever)


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


# -- bad values

BAD = [
    {"temperature": "warm"}, {"temperature": None}, {"alpha": [1]}, {"top_k": 1.5}, {"max_tokens": 0}, {"seed": -1},
    {"guard": "strict"}, {"guard": {"threshold": 7}}, {"stop": 5}, {"stop": [""]}, {"rule": "other"}, {"top_p": True},
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("bad", BAD, ids=str)
async def test_a_bad_value_is_named_wherever_it_is_given(
    kind: Any, bad: dict[str, Any], detoxigen: ScriptedDetoxiGen
) -> None:
    llm = kind(detoxigen=detoxigen)
    (field,) = bad
    for way in (
        lambda: kind(detoxigen=detoxigen, **bad),
        lambda: llm.invoke("Hi", **bad),
        lambda: list(llm.stream("Hi", **bad)),
        lambda: llm.batch(["Hi", "you"], **bad),
        lambda: list(llm.batch_as_completed(["Hi", "you"], **bad)),
        lambda: llm.bind(**bad),
        lambda: llm.with_retry(stop_after_attempt=1).bind(**bad).invoke("Hi"),
    ):
        with pytest.raises(InvalidParamsError) as told:
            way()
        assert told.value.field.split(".")[0] == field
    with pytest.raises(InvalidParamsError, match=field):
        await llm.ainvoke("Hi", **bad)
    with pytest.raises(InvalidParamsError, match=field):
        _ = [chunk async for chunk in llm.astream("Hi", **bad)]
    assert not detoxigen.calls


@BOTH
def test_a_call_reads_values_as_the_constructor_does(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    given: Any = {"temperature": "0.5", "guard": {"threshold": 0.3}, "stop": "you"}
    kind(detoxigen=detoxigen, **given).invoke("Hi")
    built = asked(detoxigen)
    kind(detoxigen=detoxigen).invoke("Hi", **given)
    assert asked(detoxigen) == built
    assert (built.temperature, built.guard, built.stop) == (0.5, GuardPolicy(threshold=0.3), ("you",))


@BOTH
def test_what_was_assigned_is_checked_at_the_call(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    llm = kind(detoxigen=detoxigen)
    llm.alpha = "much"
    with pytest.raises(InvalidParamsError, match="alpha"):
        llm.invoke("Hi")


@pytest.mark.parametrize("word", [5, "x", [5], [None]])
def test_tools_and_schemas_too(word: Any, detoxigen: ScriptedDetoxiGen) -> None:
    chat: Any = ChatDetoxiGen(detoxigen=detoxigen)
    for way in (lambda: chat.bind_tools(word), lambda: chat.invoke("Hi", tools=word)):
        with pytest.raises(InvalidParamsError, match="tools"):
            way()
    for method in ("json_schema", "function_calling", "json_mode"):
        with pytest.raises(InvalidParamsError, match="schema"):
            chat.with_structured_output(word, method=method)
    with pytest.raises(InvalidParamsError, match="parallel_tool_calls"):
        chat.bind_tools([look_up], parallel_tool_calls="no")
    with pytest.raises(InvalidParamsError, match="parallel_tool_calls"):
        chat.invoke("Hi", tools=[look_up], parallel_tool_calls="no")


@pytest.mark.parametrize(
    "bad", [{"ladder": 5}, {"ladder": None}, {"ladder": "rewrite"}, {"scorer": 5}, {"replacement": 5}], ids=str
)
def test_and_those_of_the_middleware_and_the_screen(bad: dict[str, Any]) -> None:
    (field,) = bad
    with pytest.raises(InvalidParamsError, match=field):
        DetoxMiddleware(**bad)
    for own in ({"threshold": True}, {"scorer": 5}):
        with pytest.raises(InvalidParamsError, match=next(iter(own))):
            DetoxDocumentScreen(**own)


@BOTH
def test_a_subclass_with_an_init_of_its_own_works(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    class Own(kind):  # type: ignore[misc]
        """It takes an argument that is no field, and sets a default of its own."""

        def __init__(self, persona: str = "x", **kwargs: Any) -> None:
            super().__init__(**{"alpha": 9.0, **kwargs})
            self._persona = persona

        _persona: str = "none"

    model = Own("reader", detoxigen=detoxigen)
    model.invoke("Hi")
    assert asked(detoxigen).alpha == 9.0
    model.bind(alpha=2.0, seed=4).with_config(tags=["t"]).invoke("Hi")
    assert (asked(detoxigen).alpha, asked(detoxigen).seed) == (2.0, 4)
    twin = model.model_copy(update={"alpha": 1.0})
    assert (type(twin), twin.alpha, twin._persona, twin.detoxigen) == (Own, 1.0, "reader", detoxigen)
    with pytest.raises(InvalidParamsError, match="alpha"):
        model.invoke("Hi", alpha=-1)


# -- caches


@BOTH
def test_the_cache_knows_engines_apart(kind: Any) -> None:
    """Two of one name may hold other weights."""
    set_llm_cache(InMemoryCache())
    one, other = ScriptedDetoxiGen(obliging), ScriptedDetoxiGen(lambda *_: "Something else.")
    assert kind(detoxigen=one, seed=1).invoke("Hi") != kind(detoxigen=other, seed=1).invoke("Hi")
    for detoxigen in (one, other, one):
        kind(detoxigen=detoxigen, seed=1).invoke("Hi")
    assert (len(one.calls), len(other.calls)) == (1, 1)


@BOTH
@pytest.mark.parametrize("cache", [True, InMemoryCache()])
def test_no_scorer_object_is_taken_for_another(kind: Any, cache: Any, detoxigen: ScriptedDetoxiGen) -> None:
    set_llm_cache(InMemoryCache())
    for word in ("rotten", "stale"):
        kind(detoxigen=detoxigen, seed=1, cache=cache, guard=GuardPolicy(scorer=ScriptedScorer(word))).invoke("Hi")
    assert len(detoxigen.calls) == 2


def test_variables_of_the_template_are_in_the_key(detoxigen: ScriptedDetoxiGen) -> None:
    set_llm_cache(InMemoryCache())
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1)
    for variables in (None, {"thinking": True}, {"thinking": False}, {"thinking": False}):
        chat.invoke("Hi", chat_template_kwargs=variables)
    assert len(detoxigen.calls) == 3


# -- errors


@pytest.mark.parametrize(
    ("error", "theirs"),
    [
        (InvalidParamsError("alpha", object(), "at most 100", hint="h"), "ModelInvalidRequestError"),
        (PromptTooLongError("prompt", 9, "at most 8", hint="h"), "ContextOverflowError"),
        (EngineBusyError("full", hint="h"), "ModelRateLimitError"),
    ],
)
def test_a_twin_crosses_processes_as_itself(error: Any, theirs: str) -> None:
    sent = as_langchain(error)
    for twin in (pickle.loads(pickle.dumps(sent)), copy.deepcopy(sent), as_langchain(sent)):
        assert type(twin) is type(sent)
        assert isinstance(twin, type(error))
        assert (str(twin), twin.hint) == (str(error), "h")
        assert getattr(twin, "field", None) == getattr(error, "field", None)
        if (base := getattr(exceptions, theirs, None)) is not None:
            assert isinstance(twin, base)


# -- what the core says of its settings


@BOTH
@pytest.mark.parametrize("name", sorted(DecodingParams.model_fields))
def test_fields_are_the_cores(kind: Any, name: str) -> None:
    """Default, description and bounds: nothing is written twice."""
    if name in ("stop_token_ids", "ignore_eos", "grammar", "trace"):
        assert name not in kind.model_fields  # no setting of a LangChain model
        return
    core, ours = DecodingParams.model_fields[name], kind.model_fields[NAMES.get(name, name)]
    assert ours.description == core.description
    assert ours.default == (None if name == "stop" else core.default)
    if name != "guard":  # it has a field for a callable, which no schema tells
        bounds = TypeAdapter(Annotated[(core.annotation, *core.metadata, None)]).json_schema()
        assert ours.json_schema_extra == bounds


@BOTH
def test_every_field_says_what_it_is(kind: Any) -> None:
    from langchain_detox_guard._fields import ModelFields

    for name in kind.model_fields.keys() & vars(ModelFields)["__annotations__"].keys():
        assert kind.model_fields[name].description, name


@BOTH
def test_llama_cpp_is_said_as_its_users_say_it(kind: Any) -> None:
    how = {"engine": "llamacpp", "n_ctx": 2048, "n_gpu_layers": -1, "n_threads": 4, "n_batch": 512, "type_k": 8}
    assert kind(model="some.gguf", **how)._loading() == how
    with pytest.raises(InvalidParamsError, match=r"n_ctx.*engine"):
        kind(model="some.gguf", n_ctx=2048)
    with pytest.raises(InvalidParamsError, match="engine"):
        kind(engine="vllm")
