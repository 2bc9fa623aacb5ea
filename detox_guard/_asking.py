"""Replies asked of an engine, one or many, by threads and by tasks. Knows places, inboxes and cancelling; no prompt.

A reply is prepared once it has a place in the engine's queue. So who asks for many prepares no more than the queue
takes, and waits where it is full. Whatever ends the asking (the last reply, an error, leaving the loop, Ctrl-C, a
cancelled task) cancels what is under way.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from detox_guard._threads import run_off_loop
from detox_guard.errors import DetoxGuardError, EngineBusyError, EngineError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable

    from detox_guard._reply import Reply
    from detox_guard.engine import Engine
    from detox_guard.results import Chunk

    Prepare = Callable[[], Reply]
    Said = tuple[int, Chunk | Exception]

__all__ = ["aask", "ask"]

_BREATH_S = 1.0
"""The longest single wait for a chunk: where a lock cannot be interrupted, Ctrl-C comes through in between."""


def ask(engine: Engine, prepares: Iterable[Prepare], *, pieces: bool = True) -> Generator[Said, None, None]:
    """What the replies say, each item with its reply's index: chunks, the last of them with the whole generation, or
    an error instead. Without `pieces`, only what ends a reply. A prepared reply that is refused says so itself.

    Raises what `prepares` raise, unless it is a `DetoxGuardError`, which is an item.
    """
    inbox: queue.SimpleQueue[Said] = queue.SimpleQueue()
    under_way = _UnderWay(engine, inbox.put, pieces)

    def heard() -> Said:
        while True:
            with suppress(queue.Empty):
                return under_way.heard(inbox.get_nowait())
            engine.check_alive()
            with suppress(queue.Empty):
                return under_way.heard(inbox.get(timeout=_BREATH_S))

    try:
        for index, prepare in enumerate(prepares):
            while not inbox.empty():
                yield heard()
            while True:
                try:
                    _not_in_a_hook(engine)
                    engine.take_place()
                    under_way.start(index, prepare)
                except DetoxGuardError as error:
                    if not under_way.waits_for(error):
                        yield index, error
                        break
                else:
                    break
                yield heard()
        while under_way:
            yield heard()
    finally:
        under_way.cancel()


async def aask(engine: Engine, prepares: Iterable[Prepare], *, pieces: bool = True) -> AsyncGenerator[Said, None]:
    """`ask` without blocking the event loop. `prepares` are called on another thread: a long prompt takes a while."""
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Said] = asyncio.Queue()

    def put(said: Said) -> None:
        try:
            loop.call_soon_threadsafe(inbox.put_nowait, said)
        except RuntimeError:  # the loop is closed: nobody waits any more
            under_way.cancel()

    under_way = _UnderWay(engine, put, pieces, loop.is_closed)

    async def start(index: int, prepare: Prepare) -> None:
        """With a place: prepare and submit on another thread, to the end. Should the loop be closed meanwhile, nobody
        is left who could go on. Whoever comes first, the thread or what keeps it from its work, has the place."""
        claim = threading.Lock()

        def run() -> None:
            if claim.acquire(blocking=False):
                under_way.start(index, prepare)

        try:
            await run_off_loop(run)
        except BaseException:
            if claim.acquire(blocking=False):
                engine.give_back()
            raise

    try:
        for index, prepare in enumerate(prepares):
            while not inbox.empty():
                yield under_way.heard(inbox.get_nowait())
            while True:
                try:
                    _not_in_a_hook(engine)
                    await engine.take_place_async()
                    await start(index, prepare)
                except DetoxGuardError as error:
                    if not under_way.waits_for(error):
                        yield index, error
                        break
                else:
                    break
                yield under_way.heard(await inbox.get())
        while under_way:
            yield under_way.heard(await inbox.get())
    finally:
        under_way.cancel()


class _UnderWay:
    """The replies that the engine has been given and that are not over."""

    def __init__(
        self, engine: Engine, put: Callable[[Said], object], pieces: bool, gone: Callable[[], bool] = lambda: False
    ) -> None:
        """`gone`: whether nobody can be told anything any more."""
        self._engine, self._put, self._pieces, self._gone = engine, put, pieces, gone
        self._replies: dict[int, Reply] = {}
        self._cancelled = False
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._replies)

    def start(self, index: int, prepare: Prepare) -> None:
        """Prepare a reply and hand it to the engine, with the place that was taken. What fails gives it back."""
        try:
            reply = prepare()
        except BaseException:
            self._engine.give_back()
            raise
        self.submit(index, reply)

    def submit(self, index: int, reply: Reply) -> None:
        """Hand a reply to the engine, with the place that was taken. One that was refused is over already."""

        def put(item: Chunk | Exception) -> None:  # on the engine's thread
            if self._pieces or _is_last(item):
                self._put((index, item))
            elif self._gone():
                self.cancel()

        reply.put = put
        with self._lock:
            if self._cancelled:
                self._engine.give_back()
                return
            self._replies[index] = reply
        if reply.refused:
            self._engine.give_back()
            reply.on_finish("guard")
            return
        try:
            self._engine.submit(reply.request, placed=True)
        except BaseException:
            self._replies.pop(index, None)
            raise

    def waits_for(self, error: DetoxGuardError) -> bool:
        """Whether a queue that refused may have room once one of these is over."""
        return isinstance(error, EngineBusyError) and bool(self._replies)

    def heard(self, said: Said) -> Said:
        """Note what was said; a reply that is over is forgotten."""
        if _is_last(said[1]):
            self._replies.pop(said[0], None)
        return said

    def cancel(self) -> None:
        """Nobody asks any more; safe from any thread, and what is submitted later is dropped."""
        with self._lock:
            self._cancelled = True
            replies, self._replies = self._replies, {}
        for reply in replies.values():
            reply.request.cancel()


def _is_last(item: Chunk | Exception) -> bool:
    return isinstance(item, Exception) or item.generation is not None


def _not_in_a_hook(engine: Engine) -> None:
    """Raise `EngineError` in a hook of the engine's own thread, which would wait for itself."""
    if engine.is_own_thread:
        raise EngineError("asked from the engine's own thread", hint="a hook must be quick: ask from another thread")
