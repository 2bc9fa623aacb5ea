"""Scores texts on a thread of its own, beside decoding. Knows scorers and futures; knows no units, no policy.

What several requests ask at about the same time is one call of the scorer. One that fails is repeated request by
request, so that only those fail whose texts it cannot score.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING

from detox_guard.errors import ScorerError
from detox_guard.scoring import HuggingFaceScorer, ToxicityScorer, checked_scores, load_scorer
from detox_guard.threads import run_aside

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Judge", "judge_for"]

_GATHER_S = 0.002
"""How long the first text waits for those of the same decoding step."""
_IDLE_S = 5.0
"""An idle thread ends; the next text starts another."""


class Judge:
    """One scorer and its thread. `submit` from any thread."""

    def __init__(self, scorer: ToxicityScorer) -> None:
        self.scorer = scorer
        self._waiting: list[tuple[tuple[str, ...], Future[list[float]]]] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, texts: Sequence[str]) -> Future[list[float]]:
        """A future of one score in [0, 1] a text, or of a `ScorerError`."""
        future: Future[list[float]] = Future()
        with self._wake:
            self._waiting.append((tuple(texts), future))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="detox-guard-judge", daemon=True)
                self._thread.start()
            self._wake.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._waiting and not self._wake.wait(_IDLE_S) and not self._waiting:
                    self._thread = None
                    return
            time.sleep(_GATHER_S)
            with self._wake:
                batch, self._waiting = self._waiting, []
            # Nobody can cancel a future that runs, so every one in the batch takes its answer.
            self._score([job for job in batch if job[1].set_running_or_notify_cancel()])

    def _score(self, batch: Sequence[tuple[tuple[str, ...], Future[list[float]]]]) -> None:
        try:
            scores = checked_scores(self.scorer, [text for texts, _ in batch for text in texts])
        except BaseException as error:  # whatever it was, somebody waits for an answer
            if len(batch) == 1:
                batch[0][1].set_exception(error if isinstance(error, ScorerError) else ScorerError(repr(error)))
            else:
                for job in batch:
                    self._score([job])
            return
        at = 0
        for texts, future in batch:
            future.set_result(scores[at : at + len(texts)])
            at += len(texts)


_judges: weakref.WeakValueDictionary[int, Judge] = weakref.WeakValueDictionary()
_judges_lock = threading.Lock()


def judge_for(scorer: str | ToxicityScorer) -> Judge:
    """The judge of this scorer, one for all who use it. A classifier is loaded here: whoever waits for a score waits by
    the clock. Raises `ScorerError`."""
    scorer = load_scorer(scorer)
    with _judges_lock:
        judge = _judges.get(id(scorer))
    if judge is None:
        if isinstance(scorer, HuggingFaceScorer):
            run_aside(scorer.load)
        with _judges_lock:
            judge = _judges.get(id(scorer)) or Judge(scorer)
            _judges[id(scorer)] = judge
    return judge


def _forget() -> None:
    """A forked child has neither the parent's threads nor a say over its locks."""
    global _judges_lock
    _judges_lock = threading.Lock()
    _judges.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
