"""Copies, dumps and pickles: a model keeps all that it was told, or refuses by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from detox_guard import GuardPolicy, InvalidParamsError
from detox_guard.errors import NotPicklableError
from detox_guard.testing import ScriptedDetoxiGen
from langchain_core.caches import InMemoryCache
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField

from langchain_detox_guard import ChatDetoxiGen, DetoxDocumentScreen, DetoxMiddleware, DetoxRetriever
from langchain_scripts import BOTH, POLICY, ROTTEN, obliging

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
