"""The places of the queue, and who waits for one: threads and tasks, in the order they came. Knows no requests."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Places"]

_BREATH_S = 1.0
"""A waiting thread looks up this often: where a lock cannot be interrupted, Ctrl-C comes through then."""


@dataclass(eq=False)
class _Ticket:
    """One who waits. `call` wakes it; it raises `RuntimeError` if nobody can be woken any more."""

    call: Callable[[], object]
    state: Literal["waiting", "given", "gone"] = "waiting"


class Places:
    """`count` places. One that is given back goes to who has waited longest. Thread-safe."""

    def __init__(self, count: int) -> None:
        # Reentrant: a task that is collected while a thread is in here gives its place back from that very thread.
        self._lock = threading.RLock()
        self._free = count
        self._waiting: deque[_Ticket] = deque()
        self._closed: Callable[[], Exception] | None = None

    @property
    def full(self) -> bool:
        """Nobody gets a place at once."""
        return self._free <= 0

    @property
    def waiting(self) -> int:
        """Who waits for one."""
        with self._lock:
            return sum(ticket.state == "waiting" for ticket in self._waiting)

    def take(self) -> bool:
        """Whether there was one. Who waits already comes first: a place is only free where nobody waits."""
        with self._lock:
            self._check()
            if self._free <= 0:
                return False
            self._free -= 1
            return True

    def wait(self, check: Callable[[], None] | None = None) -> None:
        """Block until there is one. `check` is called now and then and may raise, which ends the waiting."""
        ready = threading.Event()
        ticket = self._enter(ready.set)
        try:
            while ticket.state == "waiting":
                if not ready.wait(_BREATH_S) and check is not None:
                    check()
            self._served(ticket)
        except BaseException:
            self._leave(ticket)
            raise

    async def wait_async(self) -> None:
        """As `wait`, for a task; cancelling it gives the place to the next."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        ticket = self._enter(lambda: loop.call_soon_threadsafe(wake))
        try:
            if ticket.state == "waiting":
                await ready
            self._served(ticket)
        except BaseException:
            self._leave(ticket)
            raise

    def give_back(self) -> None:
        """One place is free again."""
        with self._lock:
            self._hand_on()

    def close(self, error: Callable[[], Exception]) -> None:
        """Nobody gets a place any more; who waits, and who comes, hears `error()`."""
        with self._lock:
            self._closed = error
            tickets, self._waiting = self._waiting, deque()
            for ticket in tickets:
                if ticket.state == "waiting":
                    ticket.state = "gone"
                    self._wake(ticket)

    def _enter(self, call: Callable[[], object]) -> _Ticket:
        with self._lock:
            self._check()
            ticket = _Ticket(call)
            if self._free > 0:
                self._free -= 1
                ticket.state = "given"
            else:
                self._waiting.append(ticket)
            return ticket

    def _served(self, ticket: _Ticket) -> None:
        if ticket.state != "given":
            self._check()

    def _leave(self, ticket: _Ticket) -> None:
        """Who has one gives it to the next; who waits is passed over when its turn comes."""
        with self._lock:
            had, ticket.state = ticket.state, "gone"
            if had == "given":
                self._hand_on()

    def _hand_on(self) -> None:
        while self._waiting:
            ticket = self._waiting.popleft()
            if ticket.state == "waiting":
                ticket.state = "given"
                if self._wake(ticket):
                    return
                ticket.state = "gone"
        self._free += 1

    def _wake(self, ticket: _Ticket) -> bool:
        try:
            ticket.call()
        except RuntimeError:  # its event loop is closed
            return False
        return True

    def _check(self) -> None:
        if self._closed is not None:
            raise self._closed()
