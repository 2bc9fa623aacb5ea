"""A full queue is waited for: in turn, from threads and tasks, and what is given up never keeps a place."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from tiny import make_tiny_backbone
from waiting import await_until, wait_until

from detox_guard import (
    DecodingParams,
    DetoxiGen,
    EngineBusyError,
    EngineClosedError,
    EngineConfig,
    EngineError,
    GuardPolicy,
    InvalidParamsError,
    PromptTooLongError,
)
from detox_guard.engine.places import Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SHORT = DecodingParams(alpha=0.0, max_new_tokens=2, ignore_eos=True, seed=1)
LONG = SHORT.replace(max_new_tokens=450)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """A process that a shell started in the background has Ctrl-C ignored, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def model_of(**config: Any) -> DetoxiGen:
    return DetoxiGen(make_tiny_backbone("llama", initializer_range=0.2), params=SHORT, config=EngineConfig(**config))


@pytest.fixture
def narrow() -> Iterator[DetoxiGen]:
    """Two seats and one place in the queue; at the end they are free, and there are no more of them."""
    with model_of(max_rows=2, max_queue=1) as model:
        yield model
        wait_until(lambda: (model.stats().seats, model.stats().queued) == (0, 0))
        assert model.generate("x").finish_reason == "length"
        held = fill(model)
        late = threading.Thread(target=model.generate, args=("x",))
        late.start()
        wait_until(lambda: model.stats().waiting == 1)
        assert model.stats().queued == 1
        let_go(held)
        late.join(60)
        assert not late.is_alive()


def fill(model: DetoxiGen) -> list[Any]:
    """Streams that hold both seats and the place."""
    streams = [model.stream("x", LONG) for _ in range(3)]
    for stream in streams[:2]:
        next(stream)

    def begin() -> None:
        with suppress(EngineClosedError):
            next(streams[2])

    last = threading.Thread(target=begin, daemon=True)
    last.start()
    wait_until(lambda: model.stats().queued == 1)
    return [*streams, last]


def let_go(held: list[Any]) -> None:
    for stream in held[:2]:
        stream.close()
    held[3].join(60)
    held[2].close()


async def test_many_more_tasks_than_places_are_all_answered(narrow: DetoxiGen) -> None:
    replies = await asyncio.gather(*(narrow.agenerate(f"Hi {i}") for i in range(60)))
    assert [reply.usage.completion_tokens for reply in replies] == [2] * 60


def test_threads_batches_and_loops_wait_side_by_side(narrow: DetoxiGen) -> None:
    found: list[int] = []
    asks: list[Callable[[], Any]] = [
        lambda: [narrow.generate("x") for _ in range(5)],
        lambda: narrow.batch(["x"] * 8),
        lambda: [list(narrow.stream("x")) for _ in range(5)],
        lambda: asyncio.run(narrow.abatch(["x"] * 8)),
        lambda: asyncio.run(gathered()),
    ]

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(narrow.agenerate("x") for _ in range(9)))

    threads = [threading.Thread(target=lambda ask=ask: found.append(len(ask()))) for ask in asks * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(found) == [5, 5, 5, 5, 8, 8, 8, 8, 9, 9]


async def test_tasks_that_give_up_leave_their_places_to_others(narrow: DetoxiGen) -> None:
    tasks = [asyncio.create_task(narrow.agenerate("x", LONG if i < 4 else SHORT)) for i in range(40)]
    await await_until(lambda: narrow.stats().seats >= 2)
    for task in tasks[::2]:
        task.cancel()
    tasks[1].cancel()
    tasks[3].cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end).__name__ for end in ends[5::2]] == ["Generation"] * 18
    assert all(isinstance(end, asyncio.CancelledError) for end in ends[::2])


# What is abandoned with its loop cannot be left in order; Python says so when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
def test_a_closed_loop_frees_seats_and_places(narrow: DetoxiGen) -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> list[Any]:
        streams = [narrow.astream("x", LONG) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        waiting = [asyncio.ensure_future(narrow.agenerate("x", LONG)) for _ in range(4)]
        await asyncio.sleep(0)  # each of them begins to wait
        return [*streams, *waiting, asyncio.ensure_future(narrow.abatch(["x"] * 3, LONG))]

    left = loop.run_until_complete(begin())
    loop.close()
    # Long before those replies would be decoded to their ends, others are served.
    assert narrow.generate("x").usage.completion_tokens == 2
    del left

    def settled() -> bool:
        gc.collect()
        batches = [thread for thread in threading.enumerate() if thread.name.startswith("detox-guard-batch")]
        return not batches and not narrow.stats().waiting

    wait_until(settled)
    gc.collect()


@pytest.mark.parametrize("how", ["generate", "stream", "batch"])
@pytest.mark.parametrize("full", [False, True])
def test_ctrl_c_ends_whatever_waits(narrow: DetoxiGen, how: str, full: bool) -> None:
    held = fill(narrow) if full else []
    main = threading.main_thread().ident
    assert main is not None
    ask: Any = {
        "generate": lambda: [narrow.generate("x", LONG) for _ in range(1000)],
        "stream": lambda: [list(narrow.stream("x", LONG)) for _ in range(1000)],
        "batch": lambda: narrow.batch(["x"] * 1000, LONG, return_exceptions=True),
    }[how]
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ask()
    if held:
        let_go(held)


def test_closing_tells_those_who_wait() -> None:
    model = model_of(max_rows=2, max_queue=1)
    held = fill(model)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            model.generate("x")
        except EngineError as error:
            errors.append(error)

    async def ask_async() -> list[Any]:
        return await asyncio.gather(*(model.agenerate("x") for _ in range(3)), return_exceptions=True)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads.append(threading.Thread(target=lambda: errors.extend(asyncio.run(ask_async()))))
    for thread in threads:
        thread.start()
    wait_until(lambda: model.stats().waiting == 6)
    model.close()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in errors] == [EngineClosedError] * 6
    assert len({id(error) for error in errors}) == 6
    del held


class Asked:
    """A scorer that notes whether it was asked."""

    name = "asked"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.texts += texts
        return [0.0] * len(texts)


def test_a_queue_may_refuse_and_what_cannot_be_served_is_never_scored() -> None:
    scorer = Asked()
    policy = GuardPolicy(scorer=scorer, scan_input=True)
    with model_of(max_rows=2, max_queue=1, when_full="refuse") as model:
        held = fill(model)
        with pytest.raises(EngineBusyError, match="at most 1"):
            model.generate("x", guard=policy)
        with pytest.raises(EngineBusyError):
            asyncio.run(model.agenerate("x", guard=policy))
        let_go(held)
        wait_until(lambda: model.stats().seats == 0)
        for ask in (model.generate, lambda *a, **k: asyncio.run(model.agenerate(*a, **k)), model.stream):
            with pytest.raises(PromptTooLongError):
                ask("a\n" * 5000, guard=policy)
        assert scorer.texts == []
        assert model.generate("x", guard=policy).finish_reason == "length"
        assert scorer.texts
    with pytest.raises(EngineClosedError):
        model.stream("x", guard=policy)


def test_first_come_first_served_and_nobody_overtakes() -> None:
    places, order = Places(1), list[int]()
    assert places.take()

    def wait(i: int) -> None:
        places.wait()
        order.append(i)
        places.give_back()

    threads = []
    for i in range(6):
        threads.append(threading.Thread(target=wait, args=(i,)))
        threads[-1].start()
        wait_until(lambda i=i: places.waiting == i + 1)
    assert not places.take()
    places.give_back()
    for thread in threads:
        thread.join(60)
    assert order == list(range(6))
    assert places.take()


def test_no_thread_to_be_had_is_an_error_by_name_and_the_next_try_works(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with model_of(max_rows=2, max_queue=1) as model:
        monkeypatch.setattr(threading.Thread, "start", refused)
        for _ in range(3):
            with pytest.raises(EngineError, match="cannot start") as caught:
                model.generate("x")
            assert caught.value.retryable
        with pytest.raises(EngineError, match="cannot start"):
            model_of()
        monkeypatch.setattr(threading.Thread, "start", start)
        assert model.generate("x").finish_reason == "length"

        async def ask() -> None:
            monkeypatch.setattr(threading.Thread, "start", refused)
            for call in (model.agenerate("x"), model.abatch(["x"])):
                with pytest.raises(EngineError, match="cannot start"):
                    await call
            monkeypatch.setattr(threading.Thread, "start", start)
            assert (await model.agenerate("x")).finish_reason == "length"

        asyncio.run(ask())


@pytest.mark.parametrize("prompts", ["one text", b"bytes", None, 3, {"role": "user"}])
def test_a_batch_of_one_text_is_no_batch(narrow: DetoxiGen, prompts: Any) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        narrow.batch(prompts)
    assert caught.value.field == "prompts"


@pytest.mark.parametrize("params", ["x", 3, {"alpha": 0.0}, [SHORT], [SHORT, 5]])
def test_params_of_a_batch_name_themselves(narrow: DetoxiGen, params: Any) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        narrow.batch(["x", "y"], params)
    assert caught.value.field == "params"
