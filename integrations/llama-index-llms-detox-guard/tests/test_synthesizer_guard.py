"""The response-synthesis hook, guarded in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.llms.detox_guard import (
    DetoxiGenLLM,
)
from llama_index_harness import CLEAN, HELD, ForeignLLM, nodes, recorded_events, scripted

from detox_guard import GuardError

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from llama_index.core.response_synthesizers import ResponseMode
from llama_index_harness import POLICY, QUERY
from synthesis import ACCUMULATES, ASK_NOTHING, CONTEXT, MODES, REWIND, Opening, answered, opening, synthesizer_for

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
