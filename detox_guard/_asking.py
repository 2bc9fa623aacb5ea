"""Replies asked of an engine, one or many, by threads and by tasks. Knows places, inboxes and cancelling; no prompt.

A reply is prepared once it has a place in the engine's queue. So who asks for many prepares no more than the queue
takes, and waits where it is full. Whatever ends the asking (the last reply, an error, leaving the loop, Ctrl-C, a
cancelled task) cancels what is under way.
"""

from __future__ import annotations

import asyncio
import queue
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from detox_guard._threads import run_off_loop
from detox_guard.errors import DetoxGuardError, EngineBusyError, EngineError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator

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
                    with _placed(engine):
                        reply = prepare()
                    under_way.submit(index, reply)
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

    under_way = _UnderWay(engine, put, pieces)
    try:
        for index, prepare in enumerate(prepares):
            while not inbox.empty():
                yield under_way.heard(inbox.get_nowait())
            while True:
                try:
                    _not_in_a_hook(engine)
                    await engine.take_place_async()
                    with _placed(engine):
                        reply = await run_off_loop(prepare)
                    under_way.submit(index, reply)
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

    def __init__(self, engine: Engine, put: Callable[[Said], object], pieces: bool) -> None:
        self._engine, self._put, self._pieces = engine, put, pieces
        self._replies: dict[int, Reply] = {}

    def __len__(self) -> int:
        return len(self._replies)

    def submit(self, index: int, reply: Reply) -> None:
        """Hand a reply to the engine, with the place that was taken. One that was refused is over already."""

        def put(item: Chunk | Exception) -> None:  # on the engine's thread
            if self._pieces or _is_last(item):
                self._put((index, item))

        reply.put = put
        self._replies[index] = reply
        if reply.refused:
            self._engine.give_back()
            reply.on_finish("guard")
            return
        try:
            self._engine.submit(reply.request, placed=True)
        except BaseException:
            del self._replies[index]
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
        for reply in self._replies.values():
            reply.request.cancel()
        self._replies = {}


def _is_last(item: Chunk | Exception) -> bool:
    return isinstance(item, Exception) or item.generation is not None


@contextmanager
def _placed(engine: Engine) -> Iterator[None]:
    """What fails in here gives its place in the queue back."""
    try:
        yield
    except BaseException:
        engine.give_back()
        raise


def _not_in_a_hook(engine: Engine) -> None:
    """Raise `EngineError` in a hook of the engine's own thread, which would wait for itself."""
    if engine.is_own_thread:
        raise EngineError("asked from the engine's own thread", hint="a hook must be quick: ask from another thread")
