"""The queue: who waits for a seat, and who is admitted, in the order of arrival. Knows rows and slots by number."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from detox_guard.engine.places import Places
from detox_guard.engine.runner import rows_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.engine.base import Bounds, Request
    from detox_guard.engine.runner import Room, Runner

__all__ = ["Queue"]


class Queue:
    """Requests that are prepared. Each has one of the `places`; all else is under its owner's lock."""

    def __init__(self, bounds: Bounds, runner: Runner) -> None:
        self.places = Places(bounds.max_queue)
        self._bounds = bounds
        self._runner = runner
        self._waiting: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, request: Request) -> None:
        self._waiting.append(request)

    def admit(self, inside: Sequence[Request]) -> list[Request]:
        """Those who may join the requests that are inside: in arrival order, while there is room."""
        admitted: list[Request] = []
        if not self._waiting:
            return admitted  # as in most steps
        rows = lanes = widest = 0
        for request in inside:
            more, room = self._takes(request)
            rows, lanes, widest = rows + more, lanes + room.lanes, max(widest, room.slots)
        while self._waiting:
            more, room = self._takes(self._waiting[0])
            rows, lanes, widest = rows + more, lanes + room.lanes, max(widest, room.slots)
            full = rows > self._bounds.max_rows or lanes * widest > self._bounds.max_cached_slots
            if full and (inside or admitted):
                break
            admitted.append(self._waiting.popleft())
            self.places.give_back()
        return admitted

    def _takes(self, request: Request) -> tuple[int, Room]:
        """Rows, and memory."""
        return rows_for(request.prompt, self._runner), self._runner.room(request.prompt, request.max_new_tokens)

    def drop_cancelled(self) -> list[Request]:
        dropped = [request for request in self._waiting if request.cancelled]
        if dropped:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for _ in dropped:
            self.places.give_back()
        return dropped

    def drop_all(self) -> list[Request]:
        """For a closed engine: their places are nobody's any more."""
        dropped, self._waiting = list(self._waiting), deque()
        return dropped
