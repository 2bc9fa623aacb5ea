"""Scorers that take their time: a request waits for its own verdicts only, and never for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from detox_benchmarks.registry.shapes import tiny_config, tiny_model
from guarding import FOREIGN, PARAMS, Gated, Scripted, fickle
from tiny import make_tiny_backbone, make_tiny_tokenizer
from waiting import WAIT_S, wait_until

from detox_guard import DecodingParams, DetoxiGen, GuardPolicy, ScorerError, aguard_text, guard_text
from detox_guard._reply import Speaker
from detox_guard.guard.reply import GuardedReply, scan
from detox_guard.models.backbone import from_model
from detox_guard.scorers.batcher import batcher_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.engine import PromptIds


def test_a_scorer_that_does_not_answer_fails_its_request_and_no_other(tiny: DetoxiGen) -> None:
    scorer = Gated()
    other = threading.Thread(target=tiny.generate, args=("x",))
    other.start()
    with pytest.raises(ScorerError, match=r"no answer in 0\.2 s"):
        tiny.generate("Hello there", guard=GuardPolicy(scorer=scorer, unit=2, scorer_timeout_s=0.2))
    other.join(WAIT_S)
    assert not other.is_alive()
    scorer.gate.set()


def test_cancelled_while_a_verdict_is_out(tiny: DetoxiGen) -> None:
    scorer = Gated()

    async def cancel() -> None:
        task = asyncio.create_task(tiny.agenerate("Hello there", guard=GuardPolicy(scorer=scorer), max_new_tokens=3))
        await asyncio.to_thread(scorer.asked.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    wait_until(lambda: tiny.stats().seats == 0)
    scorer.gate.set()


def test_units_of_one_step_are_one_call(tiny: DetoxiGen) -> None:
    scorer = Scripted(lambda text: 0.0)
    policy = GuardPolicy(scorer=scorer, context_chars=0, scan_input=False)
    tiny.batch(["x"] * 24, [PARAMS.replace(guard=policy, seed=1)] * 24)  # some may enter a step late
    texts = sum(len(call) for call in scorer.calls)
    assert texts >= 24
    assert len(scorer.calls) <= texts / 3


def test_many_flagged_at_once_are_all_served(tiny: DetoxiGen) -> None:
    """A scorer that takes its time for each text; the searches share it."""

    class Slow(Scripted):
        def score(self, texts: Sequence[str]) -> list[float]:
            time.sleep(0.01 * len(texts))
            return super().score(texts)

    scorer = Slow(fickle(5, 0.2))
    policy = GuardPolicy(scorer=scorer, unit=24, max_rewinds=2, scorer_timeout_s=30)
    results = tiny.batch(
        ["Hello there"] * 12,
        [PARAMS.replace(guard=policy, seed=seed, max_new_tokens=24) for seed in range(12)],
        return_exceptions=True,
    )
    assert [type(result).__name__ for result in results] == ["Generation"] * 12
    assert sum(len(result.interventions) for result in results) > 4


def test_what_timed_out_or_was_cancelled_is_not_scored_later(tiny: DetoxiGen) -> None:
    scorer = Gated()
    policy = GuardPolicy(scorer=scorer, scorer_timeout_s=0.2, unit=3)
    params = PARAMS.replace(guard=policy)

    async def give_up() -> None:
        task = asyncio.create_task(
            tiny.agenerate("Hello there", params.replace(guard=policy.replace(scorer_timeout_s=60)))
        )
        await asyncio.to_thread(wait_until, lambda: tiny.stats().seats)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def gone() -> None:
        async def pieces() -> Any:
            yield FOREIGN

        with pytest.raises(ScorerError, match="no answer"):
            _ = [text async for text in aguard_text(pieces(), policy)]

    results = tiny.batch(["Hello there", "x"] * 4, params, return_exceptions=True)
    assert {type(result) for result in results} == {ScorerError}
    asyncio.run(give_up())
    asyncio.run(gone())
    for scan_or_hold in (lambda: scan(["It rains."], policy), lambda: list(guard_text([FOREIGN], policy))):
        with pytest.raises(ScorerError, match="no answer"):
            scan_or_hold()
    wait_until(lambda: len(batcher_for(scorer)) <= 16)  # the one call that hangs
    scorer.gate.set()
    assert "".join(guard_text([FOREIGN], policy.replace(scorer_timeout_s=60))) == FOREIGN
    assert all(text in FOREIGN for text in scorer.scored)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("kind", ["lfm2", "granitemoehybrid", "minimax", "openai-gpt"])
def test_a_last_unit_is_decoded_again_after_the_end_token(kind: str, replaced: bool) -> None:
    """The rows had left the batch by then, with all that this kind of model keeps."""
    backbone = from_model(tiny_model(tiny_config(kind)), make_tiny_tokenizer(), id=f"tiny-{kind}")
    with DetoxiGen(backbone, params=PARAMS.replace(alpha=0.0)) as model:
        free = model.generate("Hello there").trace
        assert free is not None
        ids = [token.token_id for token in free.tokens]
        end = max((ids.index(token), token) for token in ids)[1]
        mild = Scripted(lambda text: 0.0)
        policy = GuardPolicy(scorer=mild, unit=6, context_chars=0, max_rewinds=3, ladder=())
        params = PARAMS.replace(alpha=0.0, stop_token_ids=(end,))
        *fit, last = [chunk.text for chunk in model.stream("Hello there", params, guard=policy) if chunk.text]
        safe = "".join(fit)
        known = {text for call in mild.calls for text in call if last not in text}

        def score_of(text: str) -> float:
            return float(text not in known if replaced else last in text)

        class AtTheEnd(Scripted):
            """Answers once the rows of the reply have left the batch."""

            def score(self, texts: Sequence[str]) -> list[float]:
                wait_until(lambda: model.stats().rows == 0)
                return super().score(texts)

        quick, slow = (
            model.generate("Hello there", params, guard=policy.replace(scorer=scorer(score_of)))
            for scorer in (Scripted, AtTheEnd)
        )
        assert (slow.text, slow.trace, slow.interventions) == (quick.text, quick.trace, quick.interventions)
        assert {event.unit for event in slow.interventions} == {len(fit)}
        if replaced:
            assert slow.text == f"{safe} {policy.replacement}"
            assert [event.action for event in slow.interventions] == ["rewind"] * 3 + ["replace"]
        else:
            assert slow.text.startswith(safe)
            assert last not in slow.text[len(safe) :]


def test_a_long_prompt_is_scanned_by_a_slow_scorer_in_time() -> None:
    """Each few dozen texts have the limit to themselves; ordinary verdicts come in between."""
    scorer = Scripted(lambda text: float("bad" in text))

    class Slow:
        name = "slow"

        def score(self, texts: Sequence[str]) -> list[float]:
            time.sleep(0.002 * len(texts))
            return scorer.score(texts)

    text = " ".join(f"It rains on day {i} of the year." for i in range(1000))
    policy = GuardPolicy(scorer=Slow(), scorer_timeout_s=1.5)
    assert scan([text], policy) == 0.0
    assert scan([f"{text} A bad day. {text}"], policy) == 1.0


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_scored() -> None:
    scorer = Scripted(lambda text: 0.0)
    params = DecodingParams(guard=GuardPolicy(scorer=scorer, scan_input=True), max_new_tokens=7)
    asked: list[Any] = []

    def check_fits(prompt: PromptIds, max_new_tokens: int, may_rewind: bool) -> None:
        asked.append((len(prompt.ids), max_new_tokens, may_rewind))
        raise KeyError("too long")

    with pytest.raises(KeyError):
        GuardedReply(Speaker(make_tiny_backbone("llama"), check_fits=check_fits), "a\n" * 500, params)
    assert asked[0][0] >= 500
    assert asked[0][1:] == (7, True)
    assert scorer.calls == []
