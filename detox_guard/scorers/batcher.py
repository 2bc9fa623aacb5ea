"""Scores texts on a thread of its own, beside decoding. Knows scorers and futures; knows no units, no policy.

What several requests ask at about the same time is one call of the scorer, to which each brings a few texts at a time:
who asks for much holds up nobody. What nobody waits for any more is not scored: cancel the future. A call that fails
is repeated request by request, so that only those fail whose texts it cannot score.
"""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from detox_guard._forking import in_children, in_children_of
from detox_guard._threads import run_aside, start_thread
from detox_guard.errors import EngineError, ScorerError
from detox_guard.scorers.base import checked_scores, load_scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.scorers.base import ToxicityScorer

__all__ = ["Batcher", "batcher_for"]

_GATHER_S = 0.002
"""How long the first text waits for those of the same decoding step."""
_IDLE_S = 5.0
"""An idle thread ends; the next text starts another."""
_SHARE, _CALL = 16, 64
"""Texts that one job brings to one call of the scorer, and from how many on a call takes no other job."""


@dataclass(eq=False)
class _Job:
    """Texts that one asked for, and the scores that are there already."""

    texts: tuple[str, ...]
    future: Future[list[float]]
    scores: list[float] = field(default_factory=list)

    @property
    def next(self) -> tuple[str, ...]:
        return self.texts[len(self.scores) : len(self.scores) + _SHARE]


class Batcher:
    """One scorer and its thread. `submit` from any thread. Its length is the number of jobs that wait."""

    most_waiting = 10_000
    """One job more is an error at once."""

    def __init__(self, scorer: ToxicityScorer) -> None:
        self.scorer = scorer
        self._waiting: dict[Future[list[float]], _Job] = {}
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        in_children_of(self, Batcher._forget)

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, texts: Sequence[str]) -> Future[list[float]]:
        """A future of one score in [0, 1] a text, or of a `ScorerError`. Cancel it when nobody waits for it."""
        future: Future[list[float]] = Future()
        if not texts:
            future.set_result([])
            return future
        with self._wake:
            if len(self._waiting) >= self.most_waiting:
                _fail(future, ScorerError(f"{self.most_waiting} texts wait for scorer {self.scorer.name!r} already"))
                return future
            if self._thread is None or not self._thread.is_alive():
                self._thread = None
                try:
                    self._thread = start_thread(self._run, "detox-guard-scorer")
                except EngineError as error:
                    _fail(future, ScorerError(f"no thread for scorer {self.scorer.name!r}: {error}", hint=error.hint))
                    return future
            self._waiting[future] = _Job(tuple(texts), future)
            self._wake.notify()
        future.add_done_callback(self._drop)
        return future

    def _drop(self, future: Future[list[float]]) -> None:
        with self._wake:
            self._waiting.pop(future, None)

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._waiting and not self._wake.wait(_IDLE_S) and not self._waiting:
                    self._thread = None
                    return
            time.sleep(_GATHER_S)
            self._score(self._take())

    def _take(self) -> list[_Job]:
        """The jobs of the next call; they go to the end of the queue."""
        batch: list[_Job] = []
        texts = 0
        with self._wake:
            for job in self._waiting.values():
                if texts >= _CALL:
                    break
                batch.append(job)
                texts += len(job.next)
            for job in batch:
                self._waiting[job.future] = self._waiting.pop(job.future)
        return batch

    def _score(self, batch: Sequence[_Job]) -> None:
        batch = [job for job in batch if not job.future.done()]
        asked = [job.next for job in batch]
        try:
            scores = checked_scores(self.scorer, [text for texts in asked for text in texts])
        except BaseException as error:  # whatever it was, somebody waits for an answer
            if len(batch) == 1:
                _fail(batch[0].future, error if isinstance(error, ScorerError) else ScorerError(repr(error)))
            else:
                for job in batch:
                    self._score([job])
            return
        at = 0
        for job, texts in zip(batch, asked, strict=True):
            job.scores += scores[at : at + len(texts)]
            at += len(texts)
            if len(job.scores) == len(job.texts):
                with suppress(InvalidStateError):  # cancelled meanwhile
                    job.future.set_result(job.scores)

    def _forget(self) -> None:
        """In a forked child: nobody is left who holds the lock, or would score what waits."""
        self._wake = threading.Condition()
        self._waiting = {}
        self._thread = None


def _fail(future: Future[list[float]], error: ScorerError) -> None:
    with suppress(InvalidStateError):
        future.set_exception(error)


_batchers: weakref.WeakValueDictionary[int, Batcher] = weakref.WeakValueDictionary()
_batchers_lock = threading.Lock()


def batcher_for(scorer: str | ToxicityScorer) -> Batcher:
    """The batcher of this scorer, one for all who use it. What has weights loads them now, for a guard's timeout starts
    when a score is asked for. Raises `ScorerError`."""
    scorer = load_scorer(scorer)
    with _batchers_lock:
        batcher = _batchers.get(id(scorer))
    if batcher is None:
        if prepare := getattr(scorer, "prepare", None):
            run_aside(prepare)
        with _batchers_lock:
            batcher = _batchers.get(id(scorer)) or Batcher(scorer)
            _batchers[id(scorer)] = batcher
    return batcher


def _forget() -> None:
    """A forked child has no say over its parent's locks."""
    global _batchers_lock
    _batchers_lock = threading.Lock()


in_children(_forget)
