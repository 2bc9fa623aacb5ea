"""The queue: who waits for a seat, and who is admitted, in the order of arrival. Knows rows and slots by number."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from detox_guard.engine.places import Places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.engine.base import Bounds, PromptIds, Request
    from detox_guard.engine.runner import Runner

__all__ = ["Queue", "room_for"]


def room_for(prompt: PromptIds, max_new_tokens: int, runner: Runner) -> tuple[int, int]:
    """The rows that a request takes, and the most slots that one of them comes to hold."""
    return 1 + len(runner.weights) if prompt.steered else 1, runner.slots(prompt) + max_new_tokens


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
        rooms = [self._room(request) for request in inside]
        rows = sum(taken for taken, _ in rooms)
        widest = max((slots for _, slots in rooms), default=0)
        admitted: list[Request] = []
        while self._waiting:
            more, slots = self._room(self._waiting[0])
            rows, widest = rows + more, max(widest, slots)
            full = rows > self._bounds.max_rows or rows * widest > self._bounds.max_cached_slots
            if full and (inside or admitted):
                break
            admitted.append(self._waiting.popleft())
            self.places.give_back()
        return admitted

    def _room(self, request: Request) -> tuple[int, int]:
        return room_for(request.prompt, request.max_new_tokens, self._runner)

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
