"""LangChain's cache serves the same words, and never those of another setting, model or guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from detox_guard import DecodingParams, GuardPolicy
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM
from langchain_scripts import BOTH, add, obliging

if TYPE_CHECKING:
    from collections.abc import Sequence


async def test_the_cache_serves_the_same_and_never_another_alpha(
    llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen
) -> None:
    set_llm_cache(InMemoryCache())
    text = llm.invoke("Hi")
    assert (llm.invoke("Hi"), len(detoxigen.calls)) == (text, 1)
    assert (await llm.ainvoke("Hi"), len(detoxigen.calls)) == (text, 1)
    for other in ({"alpha": 0.0}, {"seed": 2}, {"stop": ["dear"]}, {"max_tokens": 2}, {"temperature": 0.0}):
        before = len(detoxigen.calls)
        fresh = llm.invoke("Hi", **other)  # type: ignore[arg-type]
        assert len(detoxigen.calls) == before + 1, other
        assert llm.bind(**other).invoke("Hi") == fresh
        assert DetoxiGenLLM(detoxigen=detoxigen, **{"seed": 1, **other}).invoke("Hi") == fresh
        assert await llm.ainvoke("Hi", **other) == fresh  # type: ignore[arg-type]
        assert len(detoxigen.calls) == before + 1, other
    assert llm.invoke("Hi", cache=False) == text
    assert detoxigen.calls[-1][2] == DecodingParams(seed=1)


def test_the_cache_knows_engines_apart(detoxigen: ScriptedDetoxiGen) -> None:
    set_llm_cache(InMemoryCache())
    other = ScriptedDetoxiGen(obliging)
    other.detoxifier_ids = ("-1:ffff00001111",)
    DetoxiGenLLM(detoxigen=detoxigen, seed=1).invoke("Hi")
    DetoxiGenLLM(detoxigen=other, seed=1).invoke("Hi")
    assert len(other.calls) == 1


class Strict:
    """A scorer."""

    name = "words"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [0.0 for _ in texts]


@BOTH
def test_the_cache_knows_guards_apart(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    """Also one that a model of one's own brings; of scorer objects it knows nothing that tells them apart."""
    set_llm_cache(InMemoryCache())
    kind(detoxigen=detoxigen, seed=1).invoke("Hi")
    for guard in (GuardPolicy(), GuardPolicy(threshold=0.3)):
        guarded = ScriptedDetoxiGen(obliging, params=DecodingParams(guard=guard))
        kind(detoxigen=guarded, seed=1).invoke("Hi")
        assert len(guarded.calls) == 1
    for _ in range(2):
        kind(detoxigen=detoxigen, seed=1, guard=GuardPolicy(threshold=0.3)).invoke("Hi")
    assert len(detoxigen.calls) == 2  # another detoxigen of its name answered before
    for cache in (None, True):
        own = ScriptedDetoxiGen(obliging, params=DecodingParams(guard=GuardPolicy(scorer=Strict())))
        kind(detoxigen=own, seed=1, cache=cache).invoke("Hi")
        kind(detoxigen=own, seed=1, cache=cache).invoke("Hi")
        assert len(own.calls) == 2


@BOTH
def test_unseeded_sampling_is_not_cached_unless_asked_for(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    set_llm_cache(InMemoryCache())
    for llm, calls in (
        (kind(detoxigen=detoxigen), 2),
        (kind(detoxigen=detoxigen, temperature=0.0), 1),
        (kind(detoxigen=detoxigen, seed=1), 1),
        (kind(detoxigen=detoxigen, cache=True), 1),
        (kind(detoxigen=detoxigen, cache=InMemoryCache()), 1),
    ):
        detoxigen.calls.clear()
        llm.invoke("Hi")
        llm.invoke("Hi")
        assert len(detoxigen.calls) == calls, llm


@BOTH
def test_nor_are_two_models_of_one_name_one(kind: Any) -> None:
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


async def test_a_chats_cache_too(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
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
