"""Who decodes when: the queue, cancelling, closing, long prompts beside short ones. On every runner."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from harness import Recorder, decode, request
from kits import TorchKit, engine_of, prompts_for, watched_engine

from detox_guard.errors import EngineBusyError, EngineClosedError, RequestCancelledError
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from kits import Kit

    from detox_guard.engine import Engine, TokenStep

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, max_new_tokens=12)
SAMPLED = DecodingParams(temperature=1.0, alpha=1.5, max_new_tokens=12)


class Gate:
    """A sink's `react` that stops the engine at its first token until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, step: TokenStep) -> None:
        self.reached.set()
        assert self.opened.wait(60)


def test_cancel_frees_the_seat_within_a_step_and_the_queue_is_bounded(kit: Kit) -> None:
    engine = engine_of(kit, "r", max_rows=2, max_queue=2, when_full="refuse")
    gate = Gate()
    running, sink = request([5, 6], GREEDY.replace(max_new_tokens=400), Recorder(gate))
    engine.submit(running)
    assert gate.reached.wait(60)
    queued = [request([5, 6], GREEDY) for _ in range(2)]
    for req, _ in queued:
        engine.submit(req)
    with pytest.raises(EngineBusyError, match=r"queue: 2 requests are waiting, at most 2"):
        engine.submit(request([5, 6], GREEDY)[0])
    running.cancel()
    gate.opened.set()
    assert isinstance(sink.wait().outcome, RequestCancelledError)
    assert len(sink.steps) == 1
    for _, other in queued:
        assert other.wait().outcome == "length"
    first, first_sink = request([5, 6], GREEDY.replace(max_new_tokens=400))
    first_sink.react = lambda step: first.cancel() if step.index == 5 else None
    engine.submit(first)
    assert isinstance(first_sink.wait().outcome, RequestCancelledError)
    assert len(first_sink.steps) == 6
    stats = engine.stats()
    assert (stats.seats, stats.rows, stats.queued) == (0, 0, 0)
    engine.close()


def test_a_runner_hears_inside_a_prefill_that_nobody_waits_for_it(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r")
    req, sink = request([5] * 30, GREEDY)
    runner.before_advance = lambda prompts, columns: req.cancel()
    engine.submit(req)
    assert isinstance(sink.wait().outcome, RequestCancelledError)
    assert runner.given_up
    engine.close()


def test_a_thousand_random_cancels_leave_everything_where_it_was() -> None:
    import psutil

    kit = TorchKit()
    engine = engine_of(kit, "r", max_rows=12)
    prompts = prompts_for(kit, 40, longest=30)
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


def test_close_fails_what_is_under_way_and_refuses_more(kit: Kit) -> None:
    engine = engine_of(kit, "r", max_rows=2)
    gate = Gate()
    pairs = [request([5, 6], GREEDY.replace(max_new_tokens=400), Recorder(gate)) for _ in range(3)]
    for req, _ in pairs:
        engine.submit(req)
    assert gate.reached.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine.closed:
        closing.join(0.001)
    gate.opened.set()
    for _, sink in pairs:
        assert isinstance(sink.wait().outcome, EngineClosedError)
    closing.join(60)
    with pytest.raises(EngineClosedError):
        engine.submit(request([5, 6], GREEDY)[0])
    engine.close()


def test_an_engine_nobody_holds_stops_its_thread_and_frees_its_runner(kit: Kit) -> None:
    before = set(threading.enumerate())
    engine, runner = watched_engine(kit, "r")
    decode(engine, [[5, 6]], GREEDY)
    (thread,) = set(threading.enumerate()) - before
    held = weakref.ref(runner)
    del engine, runner
    thread.join(60)
    assert not thread.is_alive()
    gc.collect()
    assert held() is None


def test_a_request_that_would_overfill_the_cache_waits_its_turn(kit: Kit) -> None:
    engine = engine_of(kit, "r", max_cached_slots=256)
    seats: list[int] = []
    pairs = []
    for length in (40, 40, 40, 5):
        sink = Recorder(lambda step: seats.append(engine.stats().seats))
        pairs.append(request([5] * length, GREEDY.replace(max_new_tokens=70), sink))
        engine.submit(pairs[-1][0])
    for _, sink in pairs:
        assert sink.wait().outcome == "length"
    assert max(seats) == 1
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


@pytest.mark.parametrize("views", ["f", "r"])
def test_a_long_prompt_holds_up_neither_streams_nor_short_prompts(kit: Kit, views: str) -> None:
    engine = engine_of(kit, views, prefill_chunk=16, prompt_cache_slots=0)
    long, short = prompts_for(kit, 1, shortest=320, longest=320)[0], [9, 8, 7]
    alone = [decode(engine, [prompt], GREEDY.replace(max_new_tokens=4))[0].ids for prompt in (long, short)]
    order, sinks = _alone_then_together(engine, long, short)
    assert order.index("2") <= 4, "the short one waits for a chunk or two"
    # 320 tokens are 20 chunks of 16, and the stream gets a token after each.
    assert order[: order.index("1")].count("0") >= 19
    assert [sink.ids for sink in sinks] == alone
    engine.close()


def test_a_long_prompt_gets_every_other_chunk_however_many_short_ones_come(kit: Kit) -> None:
    engine = engine_of(kit, "r", prefill_chunk=16, max_rows=64)
    long, *shorts = prompts_for(kit, 101, shortest=160, longest=160)
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
