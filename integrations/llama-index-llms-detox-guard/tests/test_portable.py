"""Copies, pickles, dicts, events and cache keys: the same configuration, or a named error."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.extractors import SummaryExtractor, TitleExtractor
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
from llama_index.core.llms import ChatMessage
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import TextNode
from llama_index.llms.detox_guard import (
    DetoxiGenLLM,
    DetoxNodePostprocessor,
    DetoxSynthesizer,
    ToxicityEvaluator,
    detox_options,
    get_detox_response_synthesizer,
    guard_chat_engine,
)
from llama_index_harness import HELD, ForeignLLM, memory, nodes, recorded_events, scripted
from pydantic import BaseModel

from detox_guard import DecodingParams, GuardPolicy, InvalidParamsError, NotPicklableError, Rung
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_index.core.schema import NodeWithScore, QueryBundle

HOOKED = GuardPolicy(threshold=0.3, on_event=print)  # a function that its name finds
NAMED = GuardPolicy(threshold=0.3, ladder=(Rung(alpha=5.0, rule="dexperts"), 9.0), unit=12)
BY_NAME: dict[str, Any] = {"model": "org/model", "detoxifier": "folder", "dtype": "float32", "revision": "r1"}
HELLO = [ChatMessage("Hello")]


class Opening(BaseModel):
    hour: int


class Locked:
    """A scorer that could not be pickled or copied even if one wanted."""

    def __init__(self, name: str = "locked") -> None:
        self.name = name
        self.lock = threading.Lock()

    def score(self, texts: list[str]) -> list[float]:
        return [0.0 for _ in texts]


def named(**options: Any) -> DetoxiGenLLM:
    options = {"alpha": 2.0, "stop": ["x"], "guard": NAMED, "chat_template_kwargs": {"thinking": False}, **options}
    return DetoxiGenLLM(**BY_NAME, system_prompt="Be kind.", **options)


def upper(prompt: str) -> str:
    return prompt.upper()


# -- what has names goes anywhere


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda llm: pickle.loads(pickle.dumps(llm)),
    "model_copy": lambda llm: llm.model_copy(),
    "deep model_copy": lambda llm: llm.model_copy(deep=True),
    "to_dict": lambda llm: type(llm).from_dict(llm.to_dict()),
    "to_json": lambda llm: type(llm).from_json(llm.to_json()),
    "model_dump": lambda llm: type(llm).from_dict(json.loads(llm.model_dump_json())),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_has_names_goes_anywhere(way: str) -> None:
    llm = named()
    again = WAYS[way](llm)
    assert type(again) is DetoxiGenLLM
    assert {name: getattr(again, name) for name in BY_NAME} == BY_NAME
    assert DecodingParams(**again.decoding) == DecodingParams(alpha=2.0, stop=("x",), guard=NAMED)
    assert again.chat_template_kwargs == {"thinking": False}
    assert again.system_prompt == "Be kind."
    assert again.to_dict() == llm.to_dict()
    again.callback_manager.as_trace("x")


def test_a_hook_that_its_name_finds_is_pickled() -> None:
    again = pickle.loads(pickle.dumps(named(guard=HOOKED, completion_to_prompt=upper)))
    assert again.decoding["guard"] == HOOKED
    assert again.completion_to_prompt is upper


def about(options: dict[str, Any]) -> DetoxiGenLLM:
    """An LLM by name, or with the engine that the options have."""
    return DetoxiGenLLM(None if "detoxigen" in options else "org/model", **options)


@pytest.mark.parametrize("way", ["copy", "deepcopy", "model_copy", "deep model_copy"])
def test_copies_share_what_belongs_to_the_process(way: str) -> None:
    engine, scorer = scripted(), Locked()
    llm = DetoxiGenLLM(detoxigen=engine, guard=GuardPolicy(scorer=scorer, on_event=lambda event: None))
    again = WAYS[way](llm)
    assert again.detoxigen is engine
    assert again.decoding["guard"].scorer is scorer
    assert again.callback_manager is llm.callback_manager
    again.chat(HELLO)
    assert engine.calls[0].params.guard == llm.decoding["guard"]


# -- what belongs to the process is refused


REFUSED: dict[str, dict[str, Any]] = {
    "detoxigen": {"detoxigen": ScriptedDetoxiGen()},
    "scorer": {"guard": GuardPolicy(scorer=Locked())},
    "picklable scorer": {"guard": GuardPolicy(scorer=ScriptedScorer("stupid"))},
    "hook": {"guard": GuardPolicy(on_event=lambda event: None)},
    "completion_to_prompt": {"completion_to_prompt": lambda prompt: prompt},
}


@pytest.mark.parametrize("what", REFUSED)
def test_pickling_what_belongs_to_the_process_is_refused(what: str) -> None:
    llm = about(REFUSED[what])
    before = dict(vars(llm))
    for thing in (llm, [llm], llm.as_structured_llm(Opening)):
        with pytest.raises(NotPicklableError):
            pickle.dumps(thing)
    assert vars(llm) == before  # upstream's own would take the field from the living object


@pytest.mark.parametrize("what", REFUSED)
def test_so_it_is_inside_a_component_that_drops_what_cannot_be_pickled(what: str) -> None:
    """An extractor without its LLM would go on with the one in `Settings`."""
    llm = about(REFUSED[what])
    for transformation in (TitleExtractor(llm=llm), SummaryExtractor(llm=llm)):
        with pytest.raises(NotPicklableError):
            pickle.dumps([transformation])
        assert transformation.llm is llm
    again = pickle.loads(pickle.dumps([TitleExtractor(llm=named())]))
    assert again[0].llm.to_dict() == named().to_dict()


@pytest.mark.parametrize("what", REFUSED)
def test_a_dict_never_becomes_something_else(what: str) -> None:
    llm = about(REFUSED[what])
    data = json.loads(llm.to_json())
    for make in (DetoxiGenLLM.from_dict, lambda data: DetoxiGenLLM.from_json(json.dumps(data))):
        with pytest.raises(NotPicklableError, match=what.split()[-1] if what != "hook" else "on_event"):
            make(data)


def test_a_dict_takes_the_object_in_its_place() -> None:
    model = scripted()
    data = DetoxiGenLLM(detoxigen=scripted(), alpha=2.0).to_dict()
    assert DetoxiGenLLM.from_dict(data, detoxigen=model).detoxigen is model


def test_callbacks_stay_behind() -> None:
    llm = named()
    llm.callback_manager.lock = threading.Lock()  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(llm))
    assert not hasattr(again.callback_manager, "lock")
    assert again.to_dict() == llm.to_dict()


# -- changes are checked


def test_model_copy_takes_fields_of_decoding() -> None:
    llm = named()
    again = llm.model_copy(update={"alpha": 5.0, "model": "other"})
    assert (again.decoding["alpha"], again.model) == (5.0, "other")
    assert again.decoding["guard"] == NAMED
    assert (llm.decoding["alpha"], llm.model) == (2.0, "org/model")


@pytest.mark.parametrize(
    "bad",
    [{"alpha": -1.0}, {"alhpa": 1.0}, {"model": 5}, {"guard": {"threshold": 3.0}}, {"decoding": {"alpha": "x"}}],
)
def test_a_bad_change_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad)) if "decoding" not in bad else "alpha"):
        named().model_copy(update=bad)


@pytest.mark.parametrize("bad", [{"device": 5}, {"decoding": 5}, {"system_prompt": 5}, {"chat_template_kwargs": 5}])
def test_a_bad_field_is_ours_to_name(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))):
        DetoxiGenLLM(**bad)


# -- cache keys


def key(llm: Any) -> str:
    return get_transformation_hash([TextNode(text="x", id_="1")], TitleExtractor(llm=llm))


def made(word: str) -> Any:
    class Inner(ScriptedScorer):
        pass

    return Inner()


def test_a_cache_key_tells_everything_apart() -> None:
    engine, scorer = scripted(), ScriptedScorer("stupid")
    kinds: list[dict[str, Any]] = [
        {},
        {"model": "org/model"},
        {"model": "org/model", "revision": "r1"},
        {"model": "org/model", "detoxifier": "a"},
        {"model": "org/model", "detoxifier": "b"},
        {"alpha": 1.0},
        {"alpha": 2.0},
        {"detoxigen": engine},
        {"detoxigen": ScriptedDetoxiGen()},
        {"detoxigen": ScriptedDetoxiGen(model_id="other")},
        {"guard": GuardPolicy()},
        {"guard": GuardPolicy(threshold=0.4)},
        {"guard": GuardPolicy(scorer="org/classifier")},
        {"guard": GuardPolicy(scorer=scorer)},
        {"guard": GuardPolicy(scorer=ScriptedScorer("stupid"))},
        {"guard": GuardPolicy(scorer=made("a"))},
        {"guard": GuardPolicy(scorer=made("b"))},
        {"guard": GuardPolicy(scorer=scorer, threshold=0.4)},
        {"completion_to_prompt": upper},
        {"completion_to_prompt": lambda prompt: prompt},
        {"completion_to_prompt": lambda prompt: prompt + "!"},
        {"chat_template_kwargs": {"thinking": True}},
        {"chat_template_kwargs": {"thinking": False}},
    ]
    llms = [DetoxiGenLLM(**kind) for kind in kinds]
    keys = [key(llm) for llm in llms]
    assert len(set(keys)) == len(kinds)
    assert [key(copy.deepcopy(llm)) for llm in llms] == keys
    assert [key(DetoxiGenLLM(**kind)) for kind in kinds] == keys  # the same objects, the same key
    assert key(llms[7].as_structured_llm(Opening)) != key(llms[8].as_structured_llm(Opening))


def test_an_object_at_a_freed_address_is_another() -> None:
    keys = {key(DetoxiGenLLM(guard=GuardPolicy(scorer=ScriptedScorer("stupid")))) for _ in range(20)}
    assert len(keys) == 20


@pytest.mark.parametrize(
    "options",
    [{"alpha": 9.0}, {"seed": 7}, {"guard": GuardPolicy()}, {"guard": GuardPolicy(scorer=Locked())}],
)
def test_options_in_force_are_part_of_a_cache_key_and_not_of_the_llm(options: dict[str, Any]) -> None:
    llm = DetoxiGenLLM("org/model", alpha=2.0)
    plain, told = key(llm), llm.to_dict()
    with detox_options(**options):
        inside, again = key(llm), key(llm)
        assert DetoxiGenLLM.from_dict(llm.to_dict()).decoding == llm.decoding
        with detox_options(max_new_tokens=5):
            further = key(llm)
    with detox_options(alpha=8.0):
        other = key(llm)
    assert inside == again
    assert len({plain, inside, further, other}) == 4
    assert (key(llm), llm.to_dict()) == (plain, told)


# -- events


@pytest.mark.parametrize("what", [*REFUSED, "named"])
def test_events_are_json_with_names(what: str) -> None:
    options = REFUSED.get(what, {})
    payload = about(options).to_payload()
    event = LLMChatStartEvent(messages=HELLO, additional_kwargs={}, model_dict=payload)
    text = event.model_dump_json()
    assert ("scripted/words" if "detoxigen" in options else "org/model") in text
    if "scorer" in what:
        assert options["guard"].scorer.name in text


def test_events_are_json_where_a_call_passes_objects() -> None:
    llm = DetoxiGenLLM(detoxigen=scripted())
    with recorded_events() as events:
        llm.chat(HELLO, guard=GuardPolicy(scorer=Locked("mine"), on_event=lambda event: None))
    (start,) = events.named("LLMChatStartEvent")
    assert "mine" in start.model_dump_json()


# -- the other parts


def test_the_postprocessor_keeps_its_scorer_or_refuses() -> None:
    one = DetoxNodePostprocessor(scorer=Locked("mine"), threshold=0.2)
    again = copy.deepcopy(one)
    assert again.scorer is one.scorer
    with pytest.raises(NotPicklableError, match="mine"):
        pickle.dumps(one)
    with pytest.raises(NotPicklableError, match="mine"):
        DetoxNodePostprocessor.from_dict(json.loads(one.to_json()))
    plain = pickle.loads(pickle.dumps(DetoxNodePostprocessor(action="drop", threshold=0.2)))
    assert (plain.action, plain.threshold, plain.scorer) == ("drop", 0.2, "embedded")


async def test_the_evaluator_keeps_its_scorer_or_refuses() -> None:
    one, clean = ToxicityEvaluator(Locked()), "The library opens at nine."
    told, twin = [await each.aevaluate(query="q", response=clean) for each in (one, copy.deepcopy(one))]
    assert told == twin
    with pytest.raises(NotPicklableError):
        pickle.dumps(one)
    strict = pickle.loads(pickle.dumps(ToxicityEvaluator(threshold=0.0001)))
    assert not (await strict.aevaluate(query="q", response=clean)).passing


def test_a_copied_hook_holds() -> None:
    hook = get_detox_response_synthesizer(ForeignLLM(), policy=GuardPolicy(scorer=ScriptedScorer("stupid")))
    again = copy.deepcopy(hook)
    assert isinstance(again, DetoxSynthesizer)
    assert again.synthesize("When?", nodes("a")).response == HELD


class Finds(BaseRetriever):
    def _retrieve(self, query: QueryBundle) -> list[NodeWithScore]:
        return nodes("It closes at six. How stupid.")


@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copied_chat_engine_is_guarded_by_itself(kind: Any, way: Any) -> None:
    engine = kind.from_defaults(retriever=Finds(), llm=ForeignLLM(), memory=memory(), system_prompt="Be brief.")
    guarded = guard_chat_engine(engine, policy=GuardPolicy(scorer=ScriptedScorer("stupid")))
    assert guarded is engine
    assert isinstance(guarded, kind)
    again = way(guarded)
    again._llm = ForeignLLM(text="Stupid. Fine.")
    response = again.chat("When?")
    assert str(response) == "[removed] Fine."
    assert "stupid" not in response.source_nodes[0].get_content()
    assert str(guarded.chat("When?")) == HELD


def test_guarding_twice_guards_by_the_second() -> None:
    engine = ContextChatEngine.from_defaults(retriever=Finds(), llm=ForeignLLM(), memory=memory())
    guard_chat_engine(engine, policy=GuardPolicy(scorer=ScriptedScorer("stupid"), replacement="[one]"))
    guard_chat_engine(engine, policy=GuardPolicy(scorer=ScriptedScorer("stupid"), replacement="[two]"))
    assert "[two]" in str(engine.chat("When?"))
    assert len(engine._node_postprocessors) == 1


@pytest.mark.parametrize("bad", [{"guard": {"threshold": 2.0}}, {"guard": {"ladder": [{"alpha": -1.0}]}}])
def test_a_guard_as_a_dict_is_read_everywhere_alike(bad: dict[str, Any]) -> None:
    engine, good = scripted(), {"guard": {"threshold": 0.25, "ladder": [{"alpha": 4.0}]}}
    expected = GuardPolicy(threshold=0.25, ladder=(Rung(alpha=4.0),))
    DetoxiGenLLM(detoxigen=engine, **good).chat(HELLO)
    DetoxiGenLLM(detoxigen=engine).chat(HELLO, **good)
    with detox_options(**good):
        DetoxiGenLLM(detoxigen=engine).chat(HELLO)
    assert [params.guard for *_, params in engine.calls] == [expected] * 3
    field = "guard.threshold" if "threshold" in bad["guard"] else r"guard\.ladder\.0\.alpha"
    for ask in (lambda: DetoxiGenLLM(**bad), lambda: DetoxiGenLLM(detoxigen=engine).chat(HELLO, **bad)):
        with pytest.raises(InvalidParamsError, match=field):
            ask()
    with pytest.raises(InvalidParamsError, match=field), detox_options(**bad):
        pytest.fail("entered")


def test_json_of_a_policy_names_its_objects_and_is_no_policy_again() -> None:
    policy = GuardPolicy(scorer=Locked("mine"), on_event=print)
    shown = json.loads(policy.model_dump_json())
    assert shown["scorer"] == {"object": "mine"}
    assert "print" in json.dumps(shown["on_event"])
    assert json.loads(NAMED.model_dump_json())["scorer"] == "embedded"
    assert policy.model_dump(mode="json", fallback=lambda value: "told")["scorer"] == "told"
    with pytest.raises(InvalidParamsError, match="scorer"):
        GuardPolicy(scorer=shown["scorer"])
