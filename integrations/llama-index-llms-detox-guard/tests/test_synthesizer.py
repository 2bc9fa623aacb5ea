"""The response-synthesis hook: every mode, guarded in and out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.llms import ChatMessage, ChatResponse, MockLLM
from llama_index.core.response_synthesizers import BaseSynthesizer, ResponseMode, SimpleSummarize, TreeSummarize
from llama_index.core.response_synthesizers.refine import StructuredRefineResponse
from llama_index.llms.detox_guard import (
    DetoxiGenLLM,
    DetoxSynthesizer,
    detox_options,
    get_detox_response_synthesizer,
)
from llama_index_harness import CLEAN, HELD, RUDE, ForeignLLM, nodes, recorded_events, scripted

from detox_guard import DetoxiGen, GuardError, GuardPolicy, Intervention, InvalidParamsError, ScorerError, StepError
from detox_guard.testing import ScriptedScorer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_index.core.llms import LLM

POLICY = GuardPolicy(scorer=ScriptedScorer("stupid"))
STRICT = GuardPolicy(scorer=ScriptedScorer("stupid", "library"), on_exhausted="raise")
QUERY = "When does the library open?"
CONTEXT = ["The library opens at nine.", "It closes at six. What a stupid building."]
MODES = list(ResponseMode)
ASK_NOTHING = (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)
ACCUMULATES = (ResponseMode.ACCUMULATE, ResponseMode.COMPACT_ACCUMULATE)
READ_NO_CONTEXT = (ResponseMode.NO_TEXT, ResponseMode.GENERATION)
REWIND = Intervention(unit=0, start=0, tokens=3, score=0.9, threshold=0.5, alpha=2.0, next_alpha=3.0, action="rewind")


async def answered(
    synthesizer: BaseSynthesizer, *, is_async: bool, context: Sequence[str] = CONTEXT, **kwargs: Any
) -> tuple[str, Any]:
    """The answer's text, its stream read to the end, and the response."""
    if is_async:
        response = await synthesizer.asynthesize(QUERY, nodes(*context), **kwargs)
    else:
        response = synthesizer.synthesize(QUERY, nodes(*context), **kwargs)
    stream = getattr(response, "response_gen", None)
    if stream is None:
        return str(response.response), response
    if hasattr(stream, "__aiter__"):
        return "".join([delta async for delta in stream]), response
    return "".join(stream), response


def synthesizer_for(llm: LLM, **options: Any) -> DetoxSynthesizer:
    options.setdefault("policy", POLICY)
    return get_detox_response_synthesizer(llm, **options)


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


# -- out


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
async def test_a_foreign_sentence_is_held_until_it_is_judged(is_async: bool, streaming: bool) -> None:
    with recorded_events() as events:
        text, response = await answered(synthesizer_for(ForeignLLM(), streaming=streaming), is_async=is_async)
    assert text == HELD
    (taken,) = response.metadata["detox"]["interventions"]
    assert (taken["where"], taken["score"], taken["action"]) == ("hold", 0.9, "replace")
    (event,) = events.named("DetoxInterventionEvent")
    assert (event.where, event.score) == ("hold", 0.9)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
async def test_a_foreign_answer_can_be_stopped_or_refused(streaming: bool) -> None:
    stop = POLICY.replace(on_exhausted="stop")
    text, _ = await answered(synthesizer_for(ForeignLLM(), policy=stop, streaming=streaming), is_async=False)
    assert text.strip() == "The library opens at nine."
    refuse = synthesizer_for(ForeignLLM(), policy=POLICY.replace(on_exhausted="raise"), streaming=streaming)
    with pytest.raises(GuardError):
        await answered(refuse, is_async=False)


async def test_no_piece_of_a_flagged_foreign_sentence_is_streamed() -> None:
    response = synthesizer_for(ForeignLLM(), streaming=True).synthesize(QUERY, nodes("a"))
    pieces = list(response.response_gen)
    assert len(pieces) >= 2
    assert not any("Only" in piece or "stupid" in piece for piece in pieces)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_what_our_own_guard_did_is_reported(is_async: bool) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted(interventions=[REWIND]))
    with recorded_events() as events:
        _, response = await answered(synthesizer_for(llm, streaming=True), is_async=is_async)
    report = response.metadata["detox"]
    taken = {"where": "decode", "score": 0.9, "action": "rewind", "alpha": 2.0, "next_alpha": 3.0}
    assert report["interventions"] == [taken]
    assert report["discarded_tokens"] == 3
    (event,) = events.named("DetoxInterventionEvent")
    assert (event.where, event.alpha, event.next_alpha) == ("decode", 2.0, 3.0)


async def test_leaving_a_guarded_stream_frees_the_seat() -> None:
    model = scripted()
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=model), streaming=True, response_mode="simple_summarize")
    response = synthesizer.synthesize(QUERY, nodes("a"))
    next(response.response_gen)
    assert model.active == 1
    response.response_gen.close()
    del response
    assert model.active == 0


class Opening(BaseModel):
    """When it opens."""

    hour: int
    remarks: list[str]
    day: str = Field(default="Monday", pattern="^(Mon|Tues)day$")


class StructuredForeign(ForeignLLM):
    """Answers with JSON, as a foreign LLM with a text program does."""


def opening(*remarks: str, day: str = "Monday") -> str:
    return json.dumps({"hour": 9, "remarks": list(remarks), "day": day})


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("structured_llm", [False, True], ids=["output_cls", "as_structured_llm"])
async def test_structured_answers_are_judged_string_by_string(is_async: bool, structured_llm: bool) -> None:
    llm: LLM = ForeignLLM(text=opening("Do come.", "How stupid."))
    kwargs = {} if structured_llm else {"output_cls": Opening}
    synthesizer = synthesizer_for(llm.as_structured_llm(Opening) if structured_llm else llm, **kwargs)
    _, response = await answered(synthesizer, is_async=is_async)
    answer = response.response
    answer = answer if isinstance(answer, Opening) else Opening.model_validate_json(answer)
    assert answer == Opening(hour=9, remarks=["Do come.", "[removed]"])
    assert len(response.metadata["detox"]["interventions"]) == 1


async def test_a_structured_answer_that_the_guard_would_break_is_refused() -> None:
    class Rude(BaseModel):
        remark: str = Field(pattern="^stupid$")

    llm = ForeignLLM(text='{"remark": "stupid"}')
    with pytest.raises(GuardError, match="Rude"):
        await answered(synthesizer_for(llm.as_structured_llm(Rude)), is_async=False)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_structured_answers_of_our_own(is_async: bool) -> None:
    model = scripted([opening("Do come.")])
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=model), output_cls=Opening, response_mode="tree_summarize")
    _, response = await answered(synthesizer, is_async=is_async)
    assert response.response == Opening(hour=9, remarks=["Do come."])
    assert all(params.guard == POLICY and params.grammar is not None for *_, params in model.calls)


async def test_structured_answer_filtering() -> None:
    reply = '<tool_call>{"name": "StructuredRefineResponse", "arguments": {"query_satisfied": true, "answer": "Nine."}}'
    model = scripted([reply + "</tool_call>"])
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=model), structured_answer_filtering=True)
    text, _ = await answered(synthesizer, is_async=False)
    assert text == "Nine."


# -- in


@pytest.mark.parametrize("action", ["drop", "mask", "mark"])
@pytest.mark.parametrize("redact", [True, False])
async def test_screening_and_redaction(action: Any, redact: bool) -> None:
    model = scripted()
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=model), context=action, redact_sources=redact)
    given = nodes(*CONTEXT)
    response = synthesizer.synthesize(QUERY, given, additional_source_nodes=nodes("Also stupid."))
    read = model.calls[0].prompt.messages[-1]["content"]
    assert ("stupid" in read, "closes at six" in read) == (action == "mark", action != "drop")
    assert "opens at nine" in read
    sources = [node.node.get_content() for node in response.source_nodes]
    assert len(sources) == 3
    assert any("stupid" in text for text in sources) is not redact
    assert response.source_nodes[1].node.metadata.get("detox_guard") == (
        {"score": 0.9, "action": action} if redact else None
    )
    assert given[1].node.get_content() == CONTEXT[1]  # what is stored stays as it is
    assert "detox_guard" not in read


async def test_dropping_everything_is_an_empty_response_with_a_report() -> None:
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=scripted()), context="drop")
    text, response = await answered(synthesizer, is_async=False, context=["How stupid."])
    assert text == "Empty Response"
    assert len(response.metadata["detox"]["screened"]) == 1
    (source,) = response.source_nodes
    assert source.node.get_content().startswith("[removed")


async def test_without_screening_the_context_is_read_as_it_is() -> None:
    model = scripted()
    _, response = await answered(synthesizer_for(DetoxiGenLLM(detoxigen=model), context=None), is_async=False)
    assert "stupid" in str(model.calls[0].prompt)
    assert response.metadata["detox"]["screened"] == []
    assert model.calls[0].params.alpha == 3.0


@pytest.mark.parametrize(
    ("context", "alpha", "expected"),
    [(CONTEXT, 3.0, 6.0), (CONTEXT, 7.0, 7.0), (CONTEXT[:1], 3.0, 3.0)],
    ids=["raised", "never lowered", "clean"],
)
async def test_alpha_follows_the_context(context: list[str], alpha: float, expected: float) -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model, alpha=alpha)
    _, response = await answered(synthesizer_for(llm), is_async=True, context=context)
    assert model.calls[0].params.alpha == expected
    assert (model.calls[0].params.calm_share == 1) is (context == CONTEXT)
    assert response.metadata["detox"]["alpha"] == (expected if context == CONTEXT else None)


async def test_alpha_is_left_alone_where_nothing_can_steer() -> None:
    model = scripted()
    model.streams = ()
    _, response = await answered(synthesizer_for(DetoxiGenLLM(detoxigen=model, alpha=0.0)), is_async=False)
    assert model.calls[0].params.alpha == 0.0
    assert response.metadata["detox"]["alpha"] is None


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_plain_chunks_are_screened_too(is_async: bool) -> None:
    model = scripted()
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=model))
    if is_async:
        assert await synthesizer.aget_response(QUERY, CONTEXT) == CLEAN
    else:
        assert synthesizer.get_response(QUERY, CONTEXT) == CLEAN
    assert "stupid" not in str(model.calls[0].prompt)
    assert model.calls[0].params.alpha == 6.0


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
    synthesizer = synthesizer_for(DetoxiGenLLM(detoxigen=model))
    assert set(synthesizer.get_prompts()) == set(synthesizer._inner.get_prompts())
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


# -- scan_input, whoever writes


SCAN = POLICY.replace(scan_input=True)
ASKED_FOR: list[str] = []


class Asked(ForeignLLM):
    """Keeps what it was asked."""

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        ASKED_FOR.append(prompt)
        return super().complete(prompt, formatted, **kwargs)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        ASKED_FOR.append(prompt)
        return super().stream_complete(prompt, formatted, **kwargs)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ASK_NOTHING])
async def test_a_flagged_question_reaches_no_foreign_llm(mode: ResponseMode, is_async: bool, streaming: bool) -> None:
    if mode in ACCUMULATES and streaming:
        pytest.skip("llama-index-core: 'Unable to stream in Accumulate response mode'")
    ASKED_FOR.clear()
    synthesizer = synthesizer_for(Asked(text=CLEAN), policy=SCAN, response_mode=mode, streaming=streaming)
    for question, expected in (("Who is stupid?", "[removed]"), ("When?", CLEAN)):
        if is_async:
            response = await synthesizer.asynthesize(question, nodes("a"))
        else:
            response = synthesizer.synthesize(question, nodes("a"))
        stream = getattr(response, "response_gen", None)
        text = str(response) if stream is None or not is_async else "".join([piece async for piece in stream])
        assert expected in text
        assert bool(ASKED_FOR) is (expected == CLEAN)
        actions = [(taken["where"], taken["action"]) for taken in response.metadata["detox"]["interventions"]]
        assert actions == ([("hold", "replace")] if expected == "[removed]" else [])


async def test_what_is_read_with_a_question_is_scanned_too() -> None:
    ASKED_FOR.clear()
    for context, expected in ((None, "[removed]"), ("mask", CLEAN)):
        synthesizer = synthesizer_for(Asked(text=CLEAN), policy=SCAN, context=context)
        assert str(synthesizer.synthesize("When?", nodes(*CONTEXT))) == expected


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("structured", [False, True])
async def test_a_flagged_question_is_answered_as_the_policy_says(structured: bool, is_async: bool) -> None:
    told: list[Any] = []
    options = {"output_cls": Opening, "response_mode": "tree_summarize"} if structured else {}
    for policy in (SCAN.replace(on_exhausted="raise"), SCAN.replace(on_event=told.append)):
        synthesizer = synthesizer_for(ForeignLLM(text=opening()), policy=policy, **options)
        ask = synthesizer.asynthesize if is_async else synthesizer.synthesize
        if structured or policy.on_exhausted == "raise":
            with pytest.raises(GuardError):
                await ask("Who is stupid?", nodes("a")) if is_async else ask("Who is stupid?", nodes("a"))
        else:
            made = ask("Who is stupid?", nodes("a"))
            assert str(await made if is_async else made) == "[removed]"
    assert [(one.unit, one.score) for one in told] == [(-1, 0.9)]
    stop = synthesizer_for(ForeignLLM(), policy=SCAN.replace(on_exhausted="stop"))
    assert stop.get_response("Who is stupid?", ["a"]) == ""


def test_our_own_llm_scans_by_itself() -> None:
    model = scripted()
    synthesizer_for(DetoxiGenLLM(detoxigen=model), policy=SCAN).synthesize("Who is stupid?", nodes("a"))
    assert [params.guard for *_, params in model.calls] == [SCAN]


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
