"""The one thread that owns the batch, and what it does in a turn. Knows requests; knows no text, no keys and values.

A turn, in this order: 1. drop what was cancelled; 2. admit from the queue, in arrival order, while rows are free;
3. a chunk of prefill, of the oldest prompt or of the shortest, by turns; 4. one decoding step for every seat; 5. ask
the parked ones again. Requests so join and leave between any two steps, and a long prompt holds up neither those who
decode nor a short prompt behind it by more than a chunk or two.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from detox_guard._forking import in_children_of, native_work
from detox_guard._threads import start_thread
from detox_guard.engine.base import EngineStats
from detox_guard.engine.decode import Decoder
from detox_guard.engine.groups import Groups
from detox_guard.engine.queue import Queue
from detox_guard.engine.reports import Reports, as_step_error
from detox_guard.engine.seats import Seats
from detox_guard.errors import EngineClosedError
from detox_guard.steering.choose import Chooser

if TYPE_CHECKING:
    from detox_guard.engine.base import Bounds, Request
    from detox_guard.engine.groups import Group
    from detox_guard.engine.places import Places
    from detox_guard.engine.runner import Runner
    from detox_guard.errors import DetoxGuardError

__all__ = ["Loop"]

_log = logging.getLogger("detox_guard.engine")
_POLL_S = 0.002
"""How often parked requests are asked again while nobody decodes."""


class Loop:
    """The loop and its state. Its owner may be collected while the thread runs; the owner's finalizer closes it."""

    def __init__(self, runner: Runner, bounds: Bounds) -> None:
        self._runner = runner
        self._bounds = bounds
        self._thread: threading.Thread | None = None
        self._closed = self._forked = False
        self._stats = EngineStats()
        self._reports = Reports(self._stats)
        self._chooser = Chooser(runner.weights)
        self._make_rooms()
        in_children_of(self, Loop._fork)

    def _make_rooms(self) -> None:
        """All that holds requests or locks."""
        self._wake = threading.Condition()
        # A request is in one of these, in this order.
        self._queue = Queue(self._bounds, self._runner)
        self._groups = Groups(self._runner, self._bounds)
        self._seats = Seats(self._runner, self._wake)
        self._decoder = Decoder(
            self._runner, self._seats, self._chooser, self._reports, self._stats, self._bounds.drafts
        )

    def _fork(self) -> None:
        """In a child there is no engine thread, and its locks may be held for ever. An engine that has not worked yet
        can begin there; any other is closed."""
        self._make_rooms()
        if self._thread is not None:
            self._closed = self._forked = True

    # -- called from any thread

    @property
    def places(self) -> Places:
        return self._queue.places

    def submit(self, request: Request) -> None:
        """Queue a request that has a place."""
        with self._wake:
            self.check_open()
            if self._thread is None or not self._thread.is_alive():
                self._thread = start_thread(self._run, "detox-guard-engine")
            self._queue.append(request)
            self._stats.submitted += 1
            self._wake.notify_all()

    def check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def check_alive(self) -> None:
        if self._forked or (self._thread is not None and not self._thread.is_alive()):
            raise self._closed_error()

    def _closed_error(self) -> EngineClosedError:
        if self._forked:
            return EngineClosedError(
                "the engine works in the parent of this forked process", hint="load the model in the child"
            )
        return EngineClosedError("the engine is closed", hint="load the model again")

    def stats(self) -> EngineStats:
        with self._wake:
            return replace(
                self._stats,
                seats=len(self._seats.requests) + len(self._groups.requests),
                rows=self._seats.rows,
                queued=len(self._queue),
                waiting=self.places.waiting,
            )

    @property
    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self, timeout_s: float = 10.0) -> None:
        with self._wake:
            first, self._closed = not self._closed, True
            self.places.close(self._closed_error)
            self._wake.notify_all()
            if first and self._thread is None:
                self._runner.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # -- the engine thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                try:
                    with native_work():
                        self._turn()
                except BaseException as error:
                    # Not foreseen, so nothing in the batch can be trusted: all of it fails, the next one starts clean.
                    _log.exception("engine step failed")
                    self._fail_all(as_step_error(error))
            self._fail_all(EngineClosedError("the engine was closed"))
            self._groups.recent.clear()
            self._runner.close()

    def _wait_for_work(self) -> bool:
        """Between two turns: whether there is another."""
        with self._wake:
            if self._seats.parked and not (self._queue or self._seats.decoding or self._groups or self._closed):
                self._wake.wait(_POLL_S)
            while not (self._closed or self._queue or self._seats.decoding or self._seats.parked or self._groups):
                self._wake.wait()
            return not self._closed

    def _turn(self) -> None:
        self._drop_cancelled()
        with self._wake:
            self._groups.add(self._queue.admit([*self._seats.requests, *self._groups.requests]))
        for group in self._groups.next():
            if self._compute(group):
                self._take_seats(group)
        if self._seats.decoding:
            self._decoder.step()
        self._decoder.ask_parked()

    def _drop_cancelled(self) -> None:
        for seat in [seat for seat in self._seats.decoding if seat.request.cancelled]:
            self._seats.leave(seat)
            self._reports.cancelled(seat.request)
        for seat in [seat for seat in self._seats.parked if seat.request.cancelled]:
            self._seats.drop_parked(seat)
            self._reports.cancelled(seat.request)
        with self._wake:
            dropped = self._queue.drop_cancelled() + self._groups.drop_cancelled()
        for request in dropped:
            self._reports.cancelled(request)

    def _compute(self, group: Group) -> bool:
        """A chunk of a group's prompts; True when they are there. An error costs only that group: a prompt is computed
        apart from the batch, so those who are decoding lose nothing."""
        try:
            return self._groups.advance(
                group,
                alone=not (self._seats.decoding or self._queue),
                given_up=lambda: self._closed or all(request.cancelled for request in group.requests),
            )
        except BaseException as error:
            _log.exception("prefill failed")
            with self._wake:
                self._groups.remove(group)
            self._reports.all_failed(group.requests, as_step_error(error))
            return False

    def _take_seats(self, group: Group) -> None:
        """Those whose prompts are computed join the batch. It is not to be trusted after an error in here: a row, or a
        layer of all rows, may be missing."""
        seated = []
        for request in list(group.requests):
            computed = group.computed[request.prompt]
            self._groups.recent.used(request.prompt)
            with self._wake:
                seated.append(self._seats.take(request, computed.logits, computed.rows))
                group.requests.remove(request)
        with self._wake:
            self._groups.remove(group)
        self._groups.recent.shrink()
        self._decoder.begin(seated)

    def _fail_all(self, error: DetoxGuardError) -> None:
        """Everyone in the batch hears of it; on a closed engine, everyone in the queue too."""
        with self._wake:
            requests = [*self._seats.requests, *self._groups.requests]
            if self._closed:
                requests += self._queue.drop_all()
            self._seats.clear()
            self._groups.drop_all()
        self._reports.all_failed(requests, error)
