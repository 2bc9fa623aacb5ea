"""The choices of one request, decoded together, and their end when nobody waits any more. Knows chunks and tasks; knows
no form of an answer."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from detox_guard.server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine

    from detox_guard.results import Chunk
    from detox_guard.server.asking import Asked
    from detox_guard.server.meters import Meters
    from detox_guard.server.models import Model

__all__ = ["Gone", "said", "unless_gone"]

T = TypeVar("T")


class Gone(Exception):
    """The client hung up."""


async def said(
    model: Model, asked: Asked, meters: Meters, name: str, *, ping_s: float | None = None
) -> AsyncGenerator[tuple[int, Chunk] | None, None]:
    """Chunks of all choices as they come, each with its choice's place. The first error is raised.

    None where nothing came for `ping_s`. Leaving it frees every seat within a token.
    """
    inbox: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue()

    async def one(place: int, prompt: Any, params: Any) -> None:
        try:
            began = last = time.perf_counter()
            first = True
            async with aclosing(model.astream(prompt, params)) as chunks:
                async for chunk in chunks:
                    now = time.perf_counter()
                    if chunk.text:
                        meters.came(name, now - (began if first else last), first=first)
                        first, last = False, now
                    if chunk.generation is not None:
                        meters.done(name, chunk.generation)
                    inbox.put_nowait((place, chunk))
            inbox.put_nowait((place, None))
        except Exception as error:
            inbox.put_nowait((place, error))

    tasks = [asyncio.create_task(one(i, *each)) for i, each in enumerate(asked.prompts)]
    left = len(tasks)
    try:
        while left:
            try:
                async with asyncio.timeout(ping_s):
                    place, item = await inbox.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T], ended: asyncio.Event) -> T:
    """The result of `work`; it is cancelled if the client hangs up (`Gone`) or the server ends (`ApiError`, 503)."""

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    watching = [asyncio.create_task(hung_up()), asyncio.create_task(ended.wait())]
    try:
        await asyncio.wait({working, *watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if watching[1].done():
            raise ApiError(503, "The server is being stopped.", "unavailable", headers={"Retry-After": "5"})
        raise Gone
    finally:
        for task in (working, *watching):
            task.cancel()
        await asyncio.gather(working, *watching, return_exceptions=True)
