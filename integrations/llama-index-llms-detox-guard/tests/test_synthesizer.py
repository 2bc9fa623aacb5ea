"""The response-synthesis hook: every mode, the policy in force, and the rest of the contract."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.llms import ChatMessage, ChatResponse, MockLLM
from llama_index.core.response_synthesizers import (
    BaseSynthesizer,
    CompactAndRefine,
    ResponseMode,
    SimpleSummarize,
    TreeSummarize,
)
from llama_index.core.response_synthesizers.refine import StructuredRefineResponse
from llama_index.llms.detox_guard import (
    DetoxiGenLLM,
    DetoxSynthesizer,
    detox_options,
    get_detox_response_synthesizer,
)
from llama_index_harness import CLEAN, HELD, RUDE, ForeignLLM, nodes, scripted

from detox_guard import DetoxiGen, GuardPolicy, InvalidParamsError, ScorerError, StepError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_index.core.llms import LLM
from llama_index_harness import POLICY, QUERY
from synthesis import (
    ACCUMULATES,
    ASK_NOTHING,
    CONTEXT,
    MODES,
    REWIND,
    STRICT,
    Opening,
    answered,
    opening,
    synthesizer_for,
)

# -- nine modes, sync and async, streamed or not


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
async def test_every_mode(mode: ResponseMode, is_async: bool, streaming: bool, ours: bool) -> None:
    if mode in ACCUMULATES and streaming:
        pytest.skip("llama-index-core: 'Unable to stream in Accumulate response mode'")
    model = scripted([CLEAN], interventions=[REWIND])
    llm = DetoxiGenLLM(detoxigen=model) if ours else ForeignLLM()
    synthesizer = synthesizer_for(llm, response_mode=mode, streaming=streaming)
    text, response = await answered(synthesizer, is_async=is_async)
    report = response.metadata["detox"]
    if mode == ResponseMode.NO_TEXT:
        assert text == ""
    elif mode == ResponseMode.CONTEXT_ONLY:
        assert "opens at nine" in text
    elif ours:
        assert CLEAN in text
        assert report["interventions"]
    else:
        assert HELD in text
        assert report["interventions"]
    assert "stupid" not in text
    assert report["guard"] == ("decode" if ours and mode not in ASK_NOTHING else "hold")
    assert report["screened"] == [{"node_id": "n1", "score": 0.9, "action": "mask"}]
    assert len(json.dumps(report)) < 4000
    if ours:
        asked = [(getattr(prompt, "messages", prompt), params) for _, prompt, params in model.calls]
        assert (not asked) == (mode in ASK_NOTHING)
        assert not any("stupid" in str(prompt) for prompt, _ in asked)
        assert all(params.guard == POLICY for _, params in asked)
        assert all((params.alpha, params.calm_share) == (6.0, 1.0) for _, params in asked)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_tree_summarize_hands_the_guard_to_its_worker_threads(is_async: bool) -> None:
    model = scripted(context_window=400)
    llm = DetoxiGenLLM(detoxigen=model, max_new_tokens=20)
    long = ["The library opens at nine. " * 40] * 3
    synthesizer = synthesizer_for(llm, response_mode="tree_summarize", use_async=True)
    await answered(synthesizer, is_async=is_async, context=long)
    assert len(model.calls) > 1
    assert all(params.guard == POLICY for *_, params in model.calls)


# -- the policy in force


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("where", ["options", "llm", "structured", "model"])
async def test_without_a_policy_the_guard_of_the_llm_stays_in_force(where: str, is_async: bool) -> None:
    model = scripted([opening("Do come.") if where == "structured" else "Do come."])
    if where == "model":
        model.params = model.params.replace(guard=STRICT)
    llm: LLM = DetoxiGenLLM(detoxigen=model, **({"guard": STRICT} if where in ("llm", "structured") else {}))
    llm = llm.as_structured_llm(Opening) if where == "structured" else llm
    with detox_options(**({"guard": STRICT} if where == "options" else {})):
        _, response = await answered(get_detox_response_synthesizer(llm), is_async=is_async)
    assert [params.guard for *_, params in model.calls] == [STRICT]
    assert len(response.metadata["detox"]["screened"]) == len(CONTEXT)


def test_a_given_policy_wins_and_so_do_options_over_the_llm() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model, guard=STRICT)
    with detox_options(guard=STRICT):
        synthesizer_for(llm).synthesize(QUERY, nodes("a"))
    with detox_options(guard=POLICY):
        get_detox_response_synthesizer(llm).synthesize(QUERY, nodes("a"))
    assert [params.guard for *_, params in model.calls] == [POLICY, POLICY]


async def test_options_hold_a_foreign_llm_too() -> None:
    with detox_options(guard=POLICY):
        text, _ = await answered(get_detox_response_synthesizer(ForeignLLM()), is_async=True)
    assert text == HELD


def test_constructing_the_hook_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetoxiGen, "shared", lambda *args, **options: pytest.fail("loaded"))
    helpers = {"prompt_helper": PromptHelper(), "chat_prompt_helper": ChatPromptHelper()}
    DetoxSynthesizer(SimpleSummarize(llm=DetoxiGenLLM(), **helpers))


# -- what goes wrong


class BrokenScorer:
    name = "broken"

    def score(self, texts: Sequence[str]) -> list[float]:
        raise RuntimeError("no scores today")


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("context", ["mask", None])
async def test_a_broken_scorer_lets_nothing_through(is_async: bool, context: Any) -> None:
    synthesizer = synthesizer_for(ForeignLLM(), policy=GuardPolicy(scorer=BrokenScorer()), context=context)
    with pytest.raises(ScorerError):
        await answered(synthesizer, is_async=is_async)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
async def test_engine_errors_come_through(is_async: bool, streaming: bool) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted([StepError("no step")]))
    with pytest.raises(StepError, match="no step"):
        await answered(synthesizer_for(llm, streaming=streaming), is_async=is_async)


# -- the rest of the contract


def test_prompts_are_the_inner_ones() -> None:
    model = scripted()
    inner = CompactAndRefine(llm=DetoxiGenLLM(detoxigen=model))
    synthesizer = DetoxSynthesizer(inner, policy=POLICY)
    assert set(synthesizer.get_prompts()) == set(inner.get_prompts())
    synthesizer.update_prompts({"text_qa_template": PromptTemplate("Q {query_str} C {context_str}")})
    synthesizer.synthesize(QUERY, nodes("a b"))
    assert model.calls[0].prompt.messages[0]["content"] == f"Q {QUERY} C a b"


def test_options_of_an_outer_scope_stay_in_force() -> None:
    model = scripted()
    with detox_options(seed=11) as replies:
        synthesizer_for(DetoxiGenLLM(detoxigen=model)).synthesize(QUERY, nodes("a"))
    assert model.calls[0].params.seed == 11
    assert len(replies) == 1


class Echo(BaseSynthesizer):
    """Asks no LLM."""

    def get_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> Any:
        return (word for word in [RUDE]) if self._streaming else RUDE

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> Any:
        return self.get_response(query_str, text_chunks)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None: ...


class SecondLLM(TreeSummarize):
    """Asks its LLM, and answers with another's words."""

    def get_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> Any:
        answer = self._llm.complete(query_str)
        assert answer.text == CLEAN
        return (word for word in [RUDE]) if self._streaming else ForeignLLM().complete(query_str).text

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **kwargs: Any) -> Any:
        return self.get_response(query_str, text_chunks)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("inner", "ours"), [(Echo, False), (Echo, True), (SecondLLM, True)])
async def test_it_wraps_any_synthesizer(inner: Any, ours: bool, streaming: bool, is_async: bool) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted()) if ours else MockLLM()
    synthesizer = DetoxSynthesizer(inner(llm=llm, streaming=streaming), policy=POLICY)
    text, response = await answered(synthesizer, is_async=is_async)
    assert text == HELD
    assert response.metadata["detox"]["guard"] == "hold"


class OwnProgram:
    """A refine program of someone else's."""

    def stream_call(self, **kwargs: Any) -> Iterator[StructuredRefineResponse]:
        yield StructuredRefineResponse(answer=RUDE, query_satisfied=True)


async def test_a_program_of_someone_elses_is_held() -> None:
    options = {"structured_answer_filtering": True, "program_factory": lambda prompt: OwnProgram()}
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=scripted()), streaming=True, **options)
    text, response = await answered(synthesizer, is_async=False)
    assert text == HELD
    assert response.metadata["detox"]["guard"] == "hold"


class Canned(DetoxiGenLLM):
    """Answers without its engine."""

    def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        return ChatResponse(message=ChatMessage(RUDE, role="assistant"))

    async def achat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        return self.chat(messages)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_an_answer_that_nobody_decoded_is_held(is_async: bool) -> None:
    text, response = await answered(synthesizer_for(Canned(detoxigen=scripted())), is_async=is_async)
    assert text == HELD
    assert response.metadata["detox"]["guard"] == "hold"


def test_prompts_are_packed_by_our_tokenizer() -> None:
    model = scripted(context_window=1000)
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=model, max_new_tokens=20), response_mode="compact")
    synthesizer.synthesize(QUERY, nodes("one two three " * 400))
    sizes = [sum(len(model.encode(m["content"])) for m in prompt.messages) for _, prompt, _ in model.calls]
    assert len(sizes) > 1
    assert max(sizes) <= 980


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_multimodal_synthesizers_are_guarded_too(is_async: bool) -> None:
    model = scripted()
    text, response = await answered(synthesizer_for(DetoxiGenLLM(detoxigen=model), multimodal=True), is_async=is_async)
    assert text == CLEAN
    assert len(response.metadata["detox"]["screened"]) == 1
    assert "stupid" not in str(model.calls[0].prompt)
    assert model.calls[0].params.guard == POLICY


# -- more of what a reader sees


class Hours(BaseModel):
    by_day: dict[str, str]


def test_keys_that_no_schema_names_are_judged() -> None:
    llm = ForeignLLM(text=json.dumps({"by_day": {"Monday": "nine", "stupid day": "ten"}}))
    response = synthesizer_for(llm.as_structured_llm(Hours)).synthesize(QUERY, nodes("a"))
    assert response.response == Hours(by_day={"Monday": "nine", "[removed]": "ten"})


@pytest.mark.parametrize(
    "bad",
    [
        {"context": "hide"},
        {"context_threshold": 1.5},
        {"toxic_context_alpha": -1},
        {"toxic_context_alpha": "6"},
        {"policy": "strict"},
        {"redact_sources": "no"},
    ],
)
def test_a_bad_option_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))):
        get_detox_response_synthesizer(ForeignLLM(), **bad)
