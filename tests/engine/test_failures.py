"""Who is told what when something breaks, and who is not touched: on every runner."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import Recorder, alone_fails, decode, random_streams, request, torch_engine
from kits import engine_of, watched_engine
from tiny import make_tiny_backbone

from detox_guard.engine import PromptIds, Request, Rewind, Sampling, Scheduler, TokenStep
from detox_guard.engine.torch.cache import RowCache
from detox_guard.errors import EngineError, PromptError, PromptTooLongError, StepError
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from kits import Kit

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, max_new_tokens=12)


def failing(*_: Any) -> Any:
    raise MemoryError("no room")


def test_a_nan_fails_its_own_request_and_nobody_else(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r")
    prompts = [[5, 6, 7], [8, 9, 10]]
    expected = decode(engine, [prompts[1]], GREEDY)[0].ids
    calls = itertools.count(1)

    def poison(logits: torch.Tensor) -> None:
        if next(calls) == 4:
            logits[1, 17] = torch.nan  # row 1 is the first request's detoxifier row

    runner.spoil = poison
    pairs = [request(prompt, GREEDY) for prompt in prompts]
    for req, _ in pairs:
        engine.submit(req)
    failed, fine = (sink.wait() for _, sink in pairs)
    assert isinstance(failed.outcome, StepError)
    assert len(failed.ids) == 4
    assert fine.ids == expected
    stats = engine.stats()
    assert stats.tokens_steered == stats.steps_steered
    engine.close()


def test_a_missing_row_of_a_view_is_an_error_never_a_plain_sample(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r", prompt_cache_slots=0)
    runner.loses_views = True
    req, sink = request([5, 6, 7], GREEDY)
    engine.submit(req)
    assert isinstance(sink.wait().outcome, StepError)
    assert sink.ids == []
    runner.loses_views = False
    assert decode(engine, [[5, 6, 7]], GREEDY)[0].outcome == "length"
    assert engine.stats().tokens_plain == 0
    engine.close()


def test_a_failing_step_reaches_everybody_and_the_next_request_is_served(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r")
    expected = decode(engine, [[5, 6, 7]], GREEDY)[0].ids
    runner.spoil = failing
    pairs = [request([5, 6, i], GREEDY) for i in range(7, 10)]
    for req, _ in pairs:
        engine.submit(req)
    outcomes = [sink.wait().outcome for _, sink in pairs]
    assert all(isinstance(outcome, StepError) and "no room" in str(outcome) for outcome in outcomes)
    # Raised in several threads, one error would collect the tracebacks of them all.
    assert len({id(outcome) for outcome in outcomes}) == 3
    runner.spoil = lambda logits: None
    assert decode(engine, [[5, 6, 7]], GREEDY)[0].ids == expected
    engine.close()


def test_a_failing_prefill_spares_those_who_decode(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r")
    expected = decode(engine, [[5, 6, 7]], GREEDY)[0].ids
    runner.before_advance = lambda prompts, columns: failing() if columns >= 9 else None
    second, second_sink = request([5] * 9, GREEDY)
    first, first_sink = request([5, 6, 7], GREEDY)
    first_sink.react = lambda step: engine.submit(second) if step.index == 2 else None
    engine.submit(first)
    assert first_sink.wait().ids == expected
    assert isinstance(second_sink.wait().outcome, StepError)
    engine.close()


def test_no_room_to_join_fails_whom_it_touched_and_no_row_is_left(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r", prompt_cache_slots=0)
    expected = decode(engine, [[5, 6, 7]], GREEDY)[0].ids
    second, second_sink = request([5] * 200, GREEDY)
    first, first_sink = request([5, 6, 7], GREEDY)
    first_sink.react = lambda step: engine.submit(second) if step.index == 2 else None
    joins = itertools.count(1)
    runner.before_join = lambda saved: failing() if next(joins) == 4 else None  # one of its two rows is there
    engine.submit(first)
    for sink in (first_sink, second_sink):
        assert isinstance(sink.wait().outcome, StepError)
        assert "no room" in str(sink.outcome)
    assert (engine.stats().rows, engine.stats().seats) == (0, 0)
    runner.before_join = lambda saved: None
    assert decode(engine, [[5, 6, 7]], GREEDY)[0].ids == expected
    engine.close()


def test_buffers_that_grew_in_part_are_not_served_from(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    expected = decode(engine, [[5, 6, 7]], GREEDY)[0].ids
    second, second_sink = request([5] * 200, GREEDY)
    first, first_sink = request([5, 6, 7], GREEDY)
    first_sink.react = lambda step: engine.submit(second) if step.index == 2 else None
    new_zeros, grown = torch.Tensor.new_zeros, itertools.count(1)

    def grow(self: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        if len(shape) == 4 and shape[2] > 200 and next(grown) == 2:  # a layer has its keys, and not yet its values
            failing()
        return new_zeros(self, *shape, **options)

    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "new_zeros", grow)
        engine.submit(first)
        for sink in (first_sink, second_sink):
            assert "no room" in str(sink.wait().outcome)
    assert decode(engine, [[5, 6, 7]], GREEDY)[0].ids == expected
    engine.close()


def test_no_room_to_go_on_is_told(kit: Kit) -> None:
    """A reply that was over, and must go on after all."""
    engine, runner = watched_engine(kit, "r")
    asked = itertools.count()

    class Undecided(Recorder):
        def on_end(self, reason: str) -> Any:
            if next(asked) == 0:
                return None
            runner.before_join = failing
            return Rewind(2)

    req, sink = request([5, 6, 7], GREEDY, Undecided())
    engine.submit(req)
    assert "no room" in str(sink.wait().outcome)
    assert engine.stats().seats == 0
    engine.close()


def test_the_cache_keeps_to_its_bound() -> None:
    cache, sizes = RowCache(num_layers=1, max_rows=40, max_slots=4000), []
    for _ in range(40):
        cache.add([(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))], 3)
        sizes.append(cache.capacity[0] * cache.capacity[1])
    for _ in range(90):
        cache.open_slot()
        cache.layers[0].update(torch.zeros(40, 1, 1, 2), torch.zeros(40, 1, 1, 2))
        cache.commit_slot()
        sizes.append(cache.capacity[0] * cache.capacity[1])
    assert 3000 < max(sizes) <= 4000


def test_a_raising_sink_fails_its_own_request(kit: Kit) -> None:
    def explode(step: TokenStep) -> None:
        raise ValueError("sink")

    assert isinstance(alone_fails(engine_of(kit, "r"), GREEDY, Recorder(explode)), ValueError)


def test_a_constraint_that_cannot_say_what_is_allowed_fails_alone(kit: Kit) -> None:
    class Broken:
        asked = 0

        def allowed(self) -> torch.Tensor | None:
            self.asked += 1
            if self.asked == 4:
                raise RuntimeError("lost")
            return None

        def accept(self, token_id: int) -> bool:
            return False

        def rollback(self, tokens: int) -> None: ...

    engine = engine_of(kit, "r")
    expected = [decode(engine, [[9, 8, i]], GREEDY)[0].ids for i in (1, 2)]
    pairs = [request([5, 6, 7], GREEDY, constraint=Broken()), *(request([9, 8, i], GREEDY) for i in (1, 2))]
    for req, _ in pairs:
        engine.submit(req)
    failed, *fine = (sink.wait() for _, sink in pairs)
    assert "lost" in str(failed.outcome)
    assert len(failed.ids) == 3
    assert [sink.ids for sink in fine] == expected
    engine.close()


def test_requests_that_cannot_be_served_are_refused_by_name(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "f", max_cached_slots=1024)
    most = engine.limits.max_positions
    assert most == runner.limits.max_positions
    with pytest.raises(PromptTooLongError, match=rf"5 virtual \+ .* at most {most} positions"):
        engine.submit(request([5] * 10, GREEDY.replace(max_new_tokens=100_000))[0])
    with pytest.raises(PromptTooLongError, match="at most 256 slots"):
        engine_of(kit, "f", max_cached_slots=256).submit(request([5] * 120, GREEDY)[0])
    with pytest.raises(PromptError, match="at least one token"):
        engine.submit(request([], GREEDY)[0])
    with pytest.raises(PromptError, match="token ids from 0"):
        engine.submit(request([5, 100_000], GREEDY)[0])
    with pytest.raises(EngineError, match="nothing steers"):
        engine.submit(Request(PromptIds((5,), False), Sampling.of(GREEDY), 4, 1, frozenset(), Recorder()))
    with pytest.raises(EngineError, match="cannot seat one request of 3 rows"):
        engine_of(kit, "fr", max_rows=2)
    bare = engine_of(kit)
    with pytest.raises(EngineError, match="no detoxifier"):
        bare.submit(request([5], GREEDY)[0])
    assert decode(bare, [[5]], GREEDY.replace(alpha=0.0))[0].outcome == "length"


def test_a_runner_that_cannot_rewind_serves_no_guard(kit: Kit) -> None:
    _, runner = watched_engine(kit, "r")
    runner.limits = replace(runner.limits, rewinds=False)
    engine = Scheduler(runner, EngineConfig())
    with pytest.raises(EngineError, match="takes tokens back"):
        engine.submit(request([5], GREEDY)[0])
    assert decode(engine, [[5]], GREEDY, may_rewind=False)[0].outcome == "length"
    engine.close()
