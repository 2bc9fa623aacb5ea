"""One scorer for many: shared fairly, asked nothing that nobody waits for, and never a wait without an end."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

import pytest
from waiting import WAIT_S, wait_until

from detox_guard import GuardPolicy, ScorerError, guard_text
from detox_guard.scorers.batcher import Batcher, batcher_for

if TYPE_CHECKING:
    from collections.abc import Sequence


class Gated:
    """Scores 0, and "bad" 1, but not before its gate is open. "broken" it cannot score."""

    name = "gated"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls: list[list[str]] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.calls.append(list(texts))
        assert self.gate.wait(WAIT_S)
        if "broken" in texts:
            raise ValueError("cannot read this")
        return [float(text == "bad") for text in texts]


@pytest.fixture
def scorer() -> Gated:
    return Gated()


def held_up(scorer: Gated) -> Batcher:
    """A batcher whose scorer is busy."""
    batcher = Batcher(scorer)
    batcher.submit(["first"])
    wait_until(lambda: bool(scorer.calls))
    return batcher


def test_what_nobody_waits_for_is_not_scored(scorer: Gated) -> None:
    batcher = held_up(scorer)
    dead = [batcher.submit([f"dead {i}"]) for i in range(100)]
    live = batcher.submit(["bad", "good"])
    for future in dead:
        assert future.cancel()
    assert len(batcher) == 2  # the first and the live one: nothing is kept for the dead
    scorer.gate.set()
    assert live.result(WAIT_S) == [1.0, 0.0]
    assert not any(text.startswith("dead") for call in scorer.calls for text in call)
    with pytest.raises(CancelledError):
        dead[0].result(0)


def test_one_that_gives_up_half_way_is_not_gone_on_with(scorer: Gated) -> None:
    batcher = Batcher(scorer)
    much = batcher.submit([f"much {i}" for i in range(1000)])
    wait_until(lambda: bool(scorer.calls))
    assert much.cancel()
    scorer.gate.set()
    assert batcher.submit(["good"]).result(WAIT_S) == [0.0]
    assert sum(text.startswith("much") for call in scorer.calls for text in call) < 100


def test_who_asks_for_much_holds_up_nobody(scorer: Gated) -> None:
    batcher = held_up(scorer)
    much = batcher.submit([f"much {i}" for i in range(1000)])
    little = [batcher.submit(["good", "bad"]) for _ in range(20)]
    scorer.gate.set()
    assert [future.result(WAIT_S) for future in little] == [[0.0, 1.0]] * 20
    assert much.result(WAIT_S) == [0.0] * 1000
    before = [texts for texts in scorer.calls[1:] if "good" in texts]
    assert scorer.calls[1:].index(before[-1]) < 5
    assert max(map(len, scorer.calls)) < 200


def test_scores_come_in_order_however_many(scorer: Gated) -> None:
    scorer.gate.set()
    batcher = Batcher(scorer)
    texts = [["bad" if i % k == 0 else "good" for i in range(k * 30)] for k in range(1, 8)]
    answers = [batcher.submit(own) for own in texts]
    for own, answer in zip(texts, answers, strict=True):
        assert answer.result(WAIT_S) == [float(text == "bad") for text in own]
    assert batcher.submit([]).result(0) == []


def test_only_those_fail_whose_texts_cannot_be_scored(scorer: Gated) -> None:
    batcher = held_up(scorer)
    futures = [batcher.submit(texts) for texts in (["good"], ["good"] * 40 + ["broken"], ["bad"])]
    scorer.gate.set()
    assert futures[0].result(WAIT_S) == [0.0]
    assert futures[2].result(WAIT_S) == [1.0]
    with pytest.raises(ScorerError, match="cannot read this"):
        futures[1].result(WAIT_S)
    assert len(batcher) == 0


def test_the_queue_has_a_bound(scorer: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "most_waiting", 3)
    batcher = held_up(scorer)
    waiting = [batcher.submit(["good"]) for _ in range(2)]
    with pytest.raises(ScorerError, match="wait for scorer 'gated'"):
        batcher.submit(["good"]).result(0)
    scorer.gate.set()
    assert [future.result(WAIT_S) for future in waiting] == [[0.0]] * 2
    assert batcher.submit(["good"]).result(WAIT_S) == [0.0]


def test_no_thread_to_be_had_is_an_error_of_ours(scorer: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer.gate.set()

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(ScorerError, match="no thread for scorer 'gated'"):
            "".join(guard_text(["It rains."], GuardPolicy(scorer=scorer)))
    assert "".join(guard_text(["It rains."], GuardPolicy(scorer=scorer))) == "It rains."


def test_a_child_forked_at_any_time_has_batchers_that_work() -> None:
    """Also those that somebody holds, whose lock another thread may have held at the fork."""
    policy, text = GuardPolicy(scorer_timeout_s=20), "It rains. We stay at home."
    batcher, stop = batcher_for("embedded"), threading.Event()

    def drive() -> None:
        while not stop.is_set():
            batcher.submit(["It rains."]).cancel()

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            half = guard_text([text], policy)
            assert next(half) == "It rains. "
            child = os.fork()
            if child == 0:
                try:
                    signal.alarm(30)
                    fit = next(half) == "We stay at home." and "".join(guard_text([text], policy)) == text
                    os._exit(0 if fit else 1)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
