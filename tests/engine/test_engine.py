"""The engine against the float64 oracle, `model.generate`, and its own invariants (DESIGN.md, 1 to 6)."""

from __future__ import annotations

import copy
import itertools
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import Recorder, check_against_oracle, decode, random_prompts, random_streams, request, torch_engine
from reference import Reference
from tiny import make_tiny_backbone

from detox_guard.engine import Rewind, TokenStep
from detox_guard.engine.torch import cache, prefill
from detox_guard.errors import (
    EngineBusyError,
    EngineClosedError,
    EngineError,
    PromptError,
    PromptTooLongError,
    RequestCancelledError,
    StepError,
)
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from detox_guard.engine import Engine

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, max_new_tokens=12)
SAMPLED = DecodingParams(temperature=1.0, alpha=1.5, max_new_tokens=12)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("streams", ["f", "r"])
def test_greedy_equals_the_two_pass_oracle_on_200_prompts(kind: str, streams: str) -> None:
    backbone = make_tiny_backbone(kind, initializer_range=0.2)
    params = GREEDY.replace(rule="detoxigen" if streams == "f" else "dexperts")
    check_against_oracle(backbone, random_streams(backbone, streams), random_prompts(backbone, 100), params)


@pytest.mark.parametrize("rule", ["detoxigen", "dexperts", "bounded"])
@pytest.mark.parametrize(
    ("streams", "changes"),
    [
        ("f", {"temperature": 0.7, "top_p": 0.8}),
        ("r", {"top_k": 7}),
        ("r", {"repetition_penalty": 1.3, "temperature": 1.4}),
        ("f", {"plausibility": 0.1, "alpha": 3.0}),
        ("frR", {"top_p": 1.0}),
        ("fF", {"top_p": 0.5, "alpha": 6.0}),
    ],
)
def test_sampled_distributions_equal_the_oracle(rule: str, streams: str, changes: dict[str, float]) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    params = SAMPLED.replace(rule=rule, **changes)
    check_against_oracle(backbone, random_streams(backbone, streams), random_prompts(backbone, 12), params)


def test_a_sliding_window_model_equals_the_oracle_inside_its_window() -> None:
    backbone = make_tiny_backbone("mistral", initializer_range=0.2, sliding_window=48)
    assert backbone.window is not None
    longest = backbone.window - GREEDY.max_new_tokens - 6
    prompts = random_prompts(backbone, 6, longest=max(1, longest))
    check_against_oracle(backbone, random_streams(backbone, "fr"), prompts, GREEDY)
    engine = torch_engine(backbone, random_streams(backbone, "f"))
    with pytest.raises(PromptTooLongError):
        decode(engine, [[5] * backbone.window], GREEDY)


@pytest.mark.parametrize("streams", ["f", "r"])
def test_a_prompt_longer_than_a_chunk_equals_the_oracle(streams: str) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    prompts = random_prompts(backbone, 3, shortest=50, longest=70)
    check_against_oracle(backbone, random_streams(backbone, streams), prompts, GREEDY, prefill_chunk=16)


def test_eager_attention_equals_the_oracle() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    backbone.model.set_attn_implementation("eager")
    check_against_oracle(backbone, random_streams(backbone, "fr"), random_prompts(backbone, 6), GREEDY)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_alpha_zero_equals_model_generate(kind: str) -> None:
    backbone = make_tiny_backbone(kind, initializer_range=0.2)
    plain = copy.deepcopy(backbone.model)
    engine = torch_engine(backbone, random_streams(backbone, "f"))
    prompts = random_prompts(backbone, 60, shortest=2)
    params = GREEDY.replace(alpha=0.0, repetition_penalty=1.1)
    for prompt, sink in zip(prompts, decode(engine, prompts, params), strict=True):
        ids = torch.tensor([prompt])
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0, repetition_penalty=1.1,
        )  # fmt: skip
        assert sink.ids == out[0, len(prompt) :].tolist()
    assert engine.stats().steps_guarded == 0
    engine.close()


def test_alpha_zero_takes_one_row() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "fr"))
    rows: list[int] = []
    sink = Recorder(lambda step: rows.append(engine.stats().rows))
    req, _ = request([5, 6, 7], GREEDY.replace(alpha=0.0), sink)
    engine.submit(req)
    sink.wait()
    guarded = Recorder(lambda step: rows.append(engine.stats().rows))
    engine.submit(request([5, 6, 7], GREEDY, guarded)[0])
    guarded.wait()
    assert set(rows[: len(sink.ids)]) == {1}
    assert set(rows[len(sink.ids) :]) == {3}
    engine.close()


@pytest.mark.parametrize("streams", ["f", "r"])
def test_alone_among_neighbours_and_joining_late_are_the_same(streams: str) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, streams), EngineConfig(max_rows=8))
    prompts = random_prompts(backbone, 10, longest=40)
    params = SAMPLED.replace(max_new_tokens=20, repetition_penalty=1.2)
    alone = [decode(engine, [prompt], params, seed=3)[0].ids for prompt in prompts]
    together = [sink.ids for sink in decode(engine, prompts, params, seed=3)]
    assert together == alone
    # Joining late: each request is submitted from inside the one before, some steps into it.
    pairs = [request(prompt, params, seed=3) for prompt in prompts]
    for (_, sink), (following, _) in pairwise(pairs):
        sink.react = lambda step, f=following: engine.submit(f) if step.index == 4 else None
    engine.submit(pairs[0][0])
    assert [sink.wait().ids for _, sink in pairs] == alone
    engine.close()


def test_mixed_parameters_in_one_batch_do_not_touch_each_other() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    prompt = random_prompts(backbone, 1)[0]
    kinds = [
        GREEDY, SAMPLED, SAMPLED.replace(alpha=0.0), GREEDY.replace(rule="detoxigen"),
        SAMPLED.replace(top_p=1.0), SAMPLED.replace(top_k=3), GREEDY.replace(repetition_penalty=2.0),
    ]  # fmt: skip
    alone = [decode(engine, [prompt], params)[0].ids for params in kinds]
    pairs = [request(prompt, params) for params in kinds]
    for req, _ in pairs:
        engine.submit(req)
    assert [sink.wait().ids for _, sink in pairs] == alone
    assert len({tuple(ids) for ids in alone}) >= len(kinds) - 1
    engine.close()


def test_every_token_lies_in_the_generators_nucleus() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    oracle = Reference.of(make_tiny_backbone("llama", initializer_range=0.2).model, random_streams(backbone, "r"))
    params = SAMPLED.replace(top_p=0.6, alpha=5.0)
    for prompt in random_prompts(backbone, 10):
        sink = decode(engine, [prompt], params)[0]
        gen, _ = oracle.log_probs(prompt, sink.ids, params)
        for i, token in enumerate(sink.ids):
            more_probable = gen[i].exp()[gen[i] > gen[i, token]].sum()
            assert more_probable < params.top_p + 1e-6
    engine.close()


@pytest.mark.parametrize("streams", ["f", "r"])
def test_a_rewound_row_equals_one_that_never_took_the_path(streams: str) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, streams))
    params = SAMPLED.replace(repetition_penalty=1.2)
    prompts = random_prompts(backbone, 4)
    straight = [sink.steps for sink in decode(engine, prompts, params, keep=True)]
    for back in (1, 3, 6):
        # At the sixth token, take back `back` of them, once; 6 goes back to the end of the prompt.
        pairs = [request(prompt, params, Recorder(_rewind_once(at=5, back=back)), keep=True) for prompt in prompts]
        for req, _ in pairs:
            engine.submit(req)
        for (_, sink), plain in zip(pairs, straight, strict=True):
            again = sink.wait().steps[6:]
            for a, b in zip(again, plain[6 - back :], strict=True):
                assert a.token_id == b.token_id
                assert a.index == b.index
                torch.testing.assert_close(dict_of(a), dict_of(b), atol=1e-5, rtol=0)
    stats = engine.stats()
    assert stats.tokens_rewound == (1 + 3 + 6) * len(prompts)
    engine.close()


def _rewind_once(at: int, back: int) -> Callable[[TokenStep], Rewind | None]:
    left = [Rewind(back)]
    return lambda step: left.pop() if step.index == at and left else None


def dict_of(step: object) -> torch.Tensor:
    ids, p = step.distribution  # type: ignore[attr-defined]
    return torch.zeros(1000).scatter_(0, ids, p)


def test_a_rewind_past_the_start_fails_that_request_only() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    bad, bad_sink = request([5, 6], SAMPLED, Recorder(lambda step: Rewind(2)))
    good, good_sink = request([5, 6], SAMPLED)
    engine.submit(bad)
    engine.submit(good)
    assert isinstance(bad_sink.wait().outcome, EngineError)
    assert good_sink.wait().outcome == "length"
    engine.close()


def test_end_ids_stop_and_are_not_emitted() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    ids = decode(engine, [[9, 8, 7]], GREEDY)[0].ids
    end = next(token for token in ids[2:] if token not in ids[:2])
    sink = decode(engine, [[9, 8, 7]], GREEDY, end_ids=frozenset({end}))[0]
    assert sink.outcome == "stop"
    assert sink.ids == ids[: ids.index(end)]
    engine.close()


def test_a_nan_fails_its_own_request_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    prompts = [[5, 6, 7], [8, 9, 10]]
    expected = decode(engine, [prompts[1]], GREEDY)[0].ids
    forward = engine._worker._runner._forward
    decode_rows = forward.decode
    calls = 0

    def poisoned(cache: object, tokens: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = decode_rows(cache, tokens)
        if calls == 4:
            logits[1, 17] = torch.nan  # row 1 is the first request's detoxifier row
        return logits

    monkeypatch.setattr(forward, "decode", poisoned)
    pairs = [request(prompt, GREEDY) for prompt in prompts]
    for req, _ in pairs:
        engine.submit(req)
    failed, fine = (sink.wait() for _, sink in pairs)
    assert isinstance(failed.outcome, StepError)
    assert len(failed.ids) == 4
    assert fine.ids == expected
    stats = engine.stats()
    assert stats.tokens_guarded == stats.steps_guarded
    engine.close()


def test_a_missing_detoxifier_row_is_an_error_never_a_plain_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    req, sink = request([5, 6, 7], GREEDY)
    sink.react = lambda step: engine._worker._seats[0].rows.pop() and None if step.index == 3 else None
    engine.submit(req)
    assert isinstance(sink.wait().outcome, StepError)
    assert len(sink.ids) == 4
    assert decode(engine, [[5, 6, 7]], GREEDY)[0].outcome == "length"
    engine.close()


def test_a_failing_step_reaches_everybody_and_the_next_request_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    expected = decode(engine, [[5, 6, 7]], GREEDY)[0].ids
    forward = engine._worker._runner._forward
    with monkeypatch.context() as m:
        m.setattr(forward, "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        pairs = [request([5, 6, 7], GREEDY) for _ in range(3)]
        for req, _ in pairs:
            engine.submit(req)
        for _, sink in pairs:
            assert isinstance(sink.wait().outcome, StepError)
            assert "out of memory" in str(sink.outcome)
    assert decode(engine, [[5, 6, 7]], GREEDY)[0].ids == expected
    engine.close()


def test_a_failing_prefill_spares_those_who_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    expected = decode(engine, [[5, 6, 7]], GREEDY)[0].ids
    run = engine._worker._runner._forward.run
    second, second_sink = request([5] * 9, GREEDY)

    def failing(cache: object, positions: torch.Tensor, **kw: object) -> torch.Tensor:
        if positions.shape[1] == 9:
            raise RuntimeError("no room")
        return run(cache, positions, **kw)

    monkeypatch.setattr(engine._worker._runner._forward, "run", failing)
    first, first_sink = request([5, 6, 7], GREEDY)
    first_sink.react = lambda step: engine.submit(second) if step.index == 2 else None
    engine.submit(first)
    assert first_sink.wait().ids == expected
    assert isinstance(second_sink.wait().outcome, StepError)
    engine.close()


def test_no_room_to_join_fails_whom_it_touched_and_no_row_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that grew in part hold nothing that could be trusted: those who decode are told, not served from them."""
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"), EngineConfig(prompt_cache_slots=0))
    expected = decode(engine, [[5, 6, 7]], GREEDY)[0].ids
    second, second_sink = request([5] * 200, GREEDY)
    first, first_sink = request([5, 6, 7], GREEDY)
    first_sink.react = lambda step: engine.submit(second) if step.index == 2 else None
    moved, calls = cache._moved, itertools.count()

    def grow(buffer: torch.Tensor, rows: int, slots: int, *rest: Any) -> torch.Tensor:
        if slots > 200 and next(calls) == 1:  # the first layer has its keys, and not yet its values
            raise RuntimeError("no room")
        return moved(buffer, rows, slots, *rest)

    with monkeypatch.context() as m:
        m.setattr(cache, "_moved", grow)
        engine.submit(first)
        for sink in (first_sink, second_sink):
            assert isinstance(sink.wait().outcome, StepError)
            assert "no room" in str(sink.outcome)
    assert (engine.stats().rows, engine.stats().seats) == (0, 0)
    assert decode(engine, [[5, 6, 7]], GREEDY)[0].ids == expected
    engine.close()


def test_no_room_to_go_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that was over, and must go on after all."""
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    asked = itertools.count()

    def full(*_: Any) -> Any:
        raise RuntimeError("no room")

    class Undecided(Recorder):
        def on_end(self, reason: str) -> Any:
            if next(asked) == 0:
                return None
            monkeypatch.setattr(cache.RowCache, "add", full)
            return Rewind(2)

    req, sink = request([5, 6, 7], GREEDY, Undecided())
    engine.submit(req)
    assert "no room" in str(sink.wait(10).outcome)
    assert engine.stats().seats == 0
    engine.close()


def test_the_cache_keeps_to_its_bound() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, (), EngineConfig(max_rows=40, max_cached_slots=4000, prompt_cache_slots=0))
    seen = []
    row_cache = engine._worker._runner._cache

    def look(step: TokenStep) -> None:
        seen.append(row_cache.capacity[0] * row_cache.capacity[1])

    params = GREEDY.replace(alpha=0.0, max_new_tokens=90)
    pairs = [request([5 + i, 6, 7], params, Recorder(look)) for i in range(60)]
    for req, _ in pairs:
        engine.submit(req)
    for _, sink in pairs:
        assert sink.wait().outcome == "length"
    assert 3000 < max(seen) <= 4000
    engine.close()


def test_a_raising_sink_fails_its_own_request() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))

    def explode(step: object) -> None:
        raise ValueError("sink")

    bad, bad_sink = request([5, 6], GREEDY, Recorder(explode))
    good, good_sink = request([5, 6], GREEDY)
    engine.submit(bad)
    engine.submit(good)
    assert isinstance(bad_sink.wait().outcome, ValueError)
    assert good_sink.wait().outcome == "length"
    engine.close()


def test_cancel_frees_the_seat_within_a_step_and_the_queue_is_bounded() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"), EngineConfig(max_rows=2, max_queue=2))
    long = GREEDY.replace(max_new_tokens=400)
    first, first_sink = request([5, 6], long)
    first_sink.react = lambda step: first.cancel() if step.index == 5 else None
    hold, release = [], []
    blocked = Recorder(lambda step: time.sleep(0.01) if not release else None)
    running, _ = request([5, 6], long, blocked)
    engine.submit(running)
    while not blocked.steps:
        time.sleep(0.001)
    for _ in range(2):
        hold.append(request([5, 6], GREEDY))
        engine.submit(hold[-1][0])
    with pytest.raises(EngineBusyError, match=r"queue: 2 requests are waiting, at most 2"):
        engine.submit(request([5, 6], GREEDY)[0])
    running.cancel()
    release.append(True)
    seen = len(blocked.steps)
    assert isinstance(blocked.wait().outcome, RequestCancelledError)
    assert len(blocked.steps) <= seen + 1
    for _, sink in hold:
        assert sink.wait().outcome == "length"
    engine.submit(first)
    assert isinstance(first_sink.wait().outcome, RequestCancelledError)
    assert len(first_sink.steps) == 6
    stats = engine.stats()
    assert (stats.seats, stats.rows, stats.queued) == (0, 0, 0)
    engine.close()


def test_a_thousand_random_cancels_leave_everything_where_it_was() -> None:
    import psutil

    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"), EngineConfig(max_rows=12))
    prompts = random_prompts(backbone, 40, longest=30)
    g = torch.Generator().manual_seed(5)

    def burst(count: int) -> None:
        pairs = []
        for i in range(count):
            req, sink = request(prompts[i % 40], SAMPLED.replace(max_new_tokens=50))
            at = int(torch.randint(0, 12, (1,), generator=g))
            if at == 0:
                engine.submit(req)
                req.cancel()
            else:
                sink.react = lambda step, r=req, at=at: r.cancel() if step.index == at else None
                engine.submit(req)
            pairs.append((req, sink))
        for _, sink in pairs:
            assert isinstance(sink.wait().outcome, RequestCancelledError)

    for _ in range(5):
        burst(100)  # allocators take a while to settle
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(10):
        burst(100)
    grown = process.memory_info().rss - before
    stats = engine.stats()
    assert (stats.seats, stats.rows, stats.queued, stats.cancelled) == (0, 0, 0, 1500)
    assert grown < 32 * 2**20
    assert decode(engine, [prompts[0]], GREEDY)[0].outcome == "length"
    engine.close()


def test_close_fails_what_is_under_way_and_refuses_more() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"), EngineConfig(max_rows=2))
    slow = [
        request([5, 6], GREEDY.replace(max_new_tokens=400), Recorder(lambda s: time.sleep(0.002))) for _ in range(3)
    ]
    for req, _ in slow:
        engine.submit(req)
    while not slow[0][1].steps:
        time.sleep(0.001)
    engine.close()
    for _, sink in slow:
        assert isinstance(sink.wait().outcome, EngineClosedError)
    with pytest.raises(EngineClosedError):
        engine.submit(slow[0][0])
    engine.close()


def test_an_engine_nobody_holds_stops_its_thread() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    decode(engine, [[5, 6]], GREEDY)
    thread = engine._worker._thread
    assert thread is not None
    del engine
    thread.join(5)
    assert not thread.is_alive()


def test_requests_that_cannot_be_served_are_refused_by_name() -> None:
    backbone = make_tiny_backbone("gpt2")
    engine = torch_engine(backbone, random_streams(backbone, "f"))
    with pytest.raises(PromptTooLongError, match="positions"):
        engine.submit(request([5] * 10, GREEDY.replace(max_new_tokens=100_000))[0])
    with pytest.raises(PromptError, match="at least one token"):
        engine.submit(request([], GREEDY)[0])
    with pytest.raises(PromptError, match="token ids from 0"):
        engine.submit(request([5, 100_000], GREEDY)[0])
    bare = torch_engine(make_tiny_backbone("gpt2"))
    with pytest.raises(EngineError, match="no detoxifier"):
        bare.submit(request([5], GREEDY)[0])
    assert decode(bare, [[5]], GREEDY.replace(alpha=0.0))[0].outcome == "length"


def test_a_request_that_would_overfill_the_cache_waits_its_turn() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"), EngineConfig(max_cached_slots=256))
    seats: list[int] = []
    pairs = []
    for length in (40, 40, 40, 5):
        sink = Recorder(lambda step: seats.append(engine.stats().seats))
        pairs.append(request([5] * length, GREEDY.replace(max_new_tokens=20), sink))
        engine.submit(pairs[-1][0])
    for _, sink in pairs:
        assert sink.wait().outcome == "length"
    assert max(seats) == 1
    with pytest.raises(PromptTooLongError, match="at most 256 slots"):
        engine.submit(request([5] * 120, GREEDY)[0])
    engine.close()


@pytest.mark.parametrize("kinds", ["r", "fr"])
def test_an_equal_prompt_is_computed_once(kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    prompts = random_prompts(backbone, 3, shortest=4)
    fresh = torch_engine(backbone, random_streams(backbone, kinds), EngineConfig(prompt_cache_slots=0))
    expected = [decode(fresh, [prompt], SAMPLED)[0].ids for prompt in prompts]
    fresh.close()
    computed: list[int] = []
    start = prefill.Prefill.__init__

    def counted(self: Any, forward: Any, ids: Any, steered: Any) -> None:
        computed.append(len(ids))
        start(self, forward, ids, steered)

    monkeypatch.setattr(prefill.Prefill, "__init__", counted)
    engine = torch_engine(backbone, random_streams(backbone, kinds), EngineConfig(prompt_cache_slots=200))
    for _ in range(2):
        assert [sink.ids for sink in decode(engine, prompts * 3, SAMPLED)] == expected * 3
    assert sum(computed) == 3
    # Neither an unguarded request nor another prompt takes what is not its own; and old ones are forgotten.
    plain = decode(engine, [prompts[0]], SAMPLED.replace(alpha=0.0))[0]
    assert not plain.steps[0].guarded
    assert sum(computed) == 4
    decode(engine, random_prompts(backbone, 12, shortest=20, seed=5), SAMPLED)
    assert sum(len(kept.rows) * kept.rows[0].slots for kept in engine._worker._recent.values()) <= 200
    engine.close()


def _alone_then_together(engine: Engine, *prompts: list[int]) -> tuple[list[str], list[Recorder]]:
    """Who gave a token when: `0` is a stream that runs; the others are submitted in one moment, from inside it."""
    order: list[str] = []
    params = GREEDY.replace(max_new_tokens=4)
    pairs = []
    for i, prompt in enumerate(prompts, start=1):
        pairs.append(request(prompt, params, Recorder(lambda step, i=i: order.append(str(i)))))

    def beside(step: TokenStep) -> None:
        order.append("0")
        if step.index == 5:
            for req, _ in pairs:
                engine.submit(req)

    running, sink = request([5, 6, 7], GREEDY.replace(max_new_tokens=120), Recorder(beside))
    engine.submit(running)
    for recorder in (sink, *(recorder for _, recorder in pairs)):
        assert recorder.wait().outcome == "length"
    return order[6:], [recorder for _, recorder in pairs]


@pytest.mark.parametrize("streams", ["f", "r"])
def test_a_long_prompt_holds_up_neither_streams_nor_short_prompts(streams: str) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, streams), EngineConfig(prefill_chunk=16))
    long, short = random_prompts(backbone, 2, shortest=320, longest=320)[0], [9, 8, 7]
    alone = [decode(engine, [prompt], GREEDY.replace(max_new_tokens=4))[0].ids for prompt in (long, short)]
    engine._worker._recent.clear()
    order, sinks = _alone_then_together(engine, long, short)
    assert order.index("2") <= 4, "the short one waits for a chunk or two"
    # 320 tokens are 20 chunks of 16, and the stream gets a token after each.
    assert order[: order.index("1")].count("0") >= 19
    assert [sink.ids for sink in sinks] == alone
    engine.close()


def test_a_long_prompt_gets_every_other_chunk_however_many_short_ones_come() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"), EngineConfig(prefill_chunk=16, max_rows=64))
    long, *shorts = random_prompts(backbone, 101, shortest=160, longest=160)
    shorts = [prompt[:10] for prompt in shorts]
    order: list[str] = []

    def beside(step: TokenStep) -> None:
        order.append("0")
        if step.index == 2:
            engine.submit(first)
        if step.index >= 2 and step.index - 2 < len(shorts):
            engine.submit(request(shorts[step.index - 2], GREEDY.replace(max_new_tokens=2))[0])

    first, sink = request(long, GREEDY, Recorder(lambda step: order.append("1")))
    running, running_sink = request([5, 6, 7], GREEDY.replace(max_new_tokens=150), Recorder(beside))
    engine.submit(running)
    assert sink.wait().outcome == running_sink.wait().outcome == "length"
    assert order.index("1") <= 2 + 2 * 10 + 4  # ten chunks, each with one of a short prompt before it
    engine.close()


def test_equal_prompts_join_what_is_being_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    config = EngineConfig(prefill_chunk=16, prompt_cache_slots=0)
    engine = torch_engine(backbone, random_streams(backbone, "r"), config)
    long = random_prompts(backbone, 1, shortest=200, longest=200)[0]
    expected = decode(engine, [long], GREEDY)[0].ids
    started: list[int] = []
    start = prefill.Prefill.__init__

    def counted(self: Any, forward: Any, ids: Any, steered: Any) -> None:
        started.append(len(ids))
        start(self, forward, ids, steered)

    monkeypatch.setattr(prefill.Prefill, "__init__", counted)
    sinks = [Recorder() for _ in range(3)]

    def beside(step: TokenStep) -> None:
        if step.index % 2 == 0 and step.index < 6:
            engine.submit(request(long, GREEDY, sinks[step.index // 2])[0])

    engine.submit(request([5, 6], GREEDY.replace(max_new_tokens=60), Recorder(beside))[0])
    assert [sink.wait().ids for sink in sinks] == [expected] * 3
    assert started == [1, 1]
    engine.close()


def test_everybody_in_a_failing_batch_gets_an_error_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    forward = engine._worker._runner._forward
    decode_rows = forward.decode

    def failing(*_: object) -> torch.Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(forward, "decode", failing)
    pairs = [request([5, 6, i], GREEDY) for i in range(7, 10)]
    for req, _ in pairs:
        engine.submit(req)
    outcomes = [sink.wait().outcome for _, sink in pairs]
    assert all(isinstance(outcome, StepError) and "no room" in str(outcome) for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 3
    monkeypatch.setattr(forward, "decode", decode_rows)
    assert decode(engine, [[5, 6]], GREEDY)[0].outcome == "length"
    engine.close()


def test_a_constraint_that_cannot_say_what_is_allowed_fails_alone() -> None:
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

    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    expected = [decode(engine, [[9, 8, i]], GREEDY)[0].ids for i in (1, 2)]
    pairs = [request([5, 6, 7], GREEDY), *(request([9, 8, i], GREEDY) for i in (1, 2))]
    pairs[0][0].constraint = Broken()
    for req, _ in pairs:
        engine.submit(req)
    failed, *fine = (sink.wait() for _, sink in pairs)
    assert "lost" in str(failed.outcome)
    assert len(failed.ids) == 3
    assert [sink.ids for sink in fine] == expected
    engine.close()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
@pytest.mark.parametrize("rule", ["detoxigen", "dexperts", "bounded"])
def test_temperatures_that_float32_cannot_hold_are_as_good_as_zero(temperature: float, rule: str) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    params = SAMPLED.replace(temperature=temperature, rule=rule, top_p=1e-300, plausibility=5e-324)
    greedy = GREEDY.replace(rule=rule, top_p=1e-300)
    prompts = random_prompts(backbone, 4)
    cold, plain = ([sink.ids for sink in decode(engine, prompts, p)] for p in (params, greedy))
    assert cold == plain
    for odd in ({"top_p": 1.0}, {"alpha": 5e-324}, {"alpha": 100.0, "top_p": 1.0}, {"repetition_penalty": 0.01}):
        assert all(sink.outcome == "length" for sink in decode(engine, prompts, params.replace(**odd)))
    engine.close()
