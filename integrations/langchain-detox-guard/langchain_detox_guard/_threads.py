"""Many requests at once, in threads that can be interrupted. Knows a model to ask; knows no message."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import aclosing, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self, TypeVar

from detox_guard import RequestCancelledError
from langchain_core.runnables.config import get_config_list, get_executor_for_config

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
    from concurrent.futures import Future

    from detox_guard import Chunk, DecodingParams, DetoxiGen, Generation
    from langchain_core.runnables import RunnableConfig

T = TypeVar("T")

AT_ONCE = 256
"""Requests of one call under way together: well under the engine's queue, well over its batch."""

_BREATH_S = 0.2
"""The longest single wait for a result: Ctrl-C that comes right before a wait does not end it, and is met after it."""


def stream(detoxigen: DetoxiGen, prompt: Any, params: DecodingParams) -> Generator[Chunk, None, None]:
    """`detoxigen.stream`; in a thread of a batch, one that the batch can cancel."""
    own = _batch.get()
    return detoxigen.stream(prompt, params) if own is None or own.over else own.stream(detoxigen, prompt, params)


def generate(detoxigen: DetoxiGen, prompt: Any, params: DecodingParams) -> Generation:
    """`detoxigen.generate`; in a thread of a batch, one that the batch can cancel."""
    own = _batch.get()
    if own is None or own.over:
        return detoxigen.generate(prompt, params)
    reply = [chunk.generation for chunk in own.stream(detoxigen, prompt, params)][-1]
    assert reply is not None, "a stream ends with its generation, or raises"
    return reply


def batch(detoxigen: DetoxiGen, prompts: Sequence[Any], params: DecodingParams) -> list[Generation]:
    """`detoxigen.batch`; in a thread of a batch, one that the batch can cancel."""
    if _batch.get() is None:
        return detoxigen.batch(prompts, params)
    return [generate(detoxigen, prompt, params) for prompt in prompts]


def each(
    ask: Callable[[Any, RunnableConfig], Any],
    inputs: Sequence[Any],
    config: RunnableConfig | Sequence[RunnableConfig] | None,
    *,
    return_exceptions: bool,
) -> Iterator[tuple[int, Any]]:
    """`ask(input, config)` of every input in threads that only wait: its place and its result, as they come.

    The first error, Ctrl-C, and leaving the loop all cancel what is under way.
    """
    if not inputs:
        return
    configs = wide(config, len(inputs))

    def one(place: int, value: Any, own: RunnableConfig) -> tuple[int, Any]:
        try:
            return place, ask(value, own)
        except Exception as error:
            if not return_exceptions:
                raise
            return place, error

    if len(inputs) == 1:
        yield one(0, inputs[0], configs[0])
        return
    finished: queue.SimpleQueue[Future[tuple[int, Any]]] = queue.SimpleQueue()
    with get_executor_for_config(configs[0]) as pool, _Requests() as requests:
        token = _batch.set(requests)  # each thread runs in a copy of this context
        try:
            futures = [pool.submit(one, i, *of) for i, of in enumerate(zip(inputs, configs, strict=True))]
        finally:
            _batch.reset(token)
        try:
            for future in futures:
                future.add_done_callback(finished.put)
            for _ in futures:
                yield _next(finished).result()
        finally:
            for future in futures:
                future.cancel()


def _next(finished: queue.SimpleQueue[Future[T]]) -> Future[T]:
    while True:
        with suppress(queue.Empty):
            return finished.get(timeout=_BREATH_S)


def wide(config: RunnableConfig | Sequence[RunnableConfig] | None, count: int) -> list[RunnableConfig]:
    """One config each, whose threads are as many as the requests: they only wait, and the engine batches them."""
    configs = get_config_list(config, count)
    if configs and configs[0].get("max_concurrency") is None:
        configs[0]["max_concurrency"] = min(count, AT_ONCE)
    return configs


class _Requests:
    """The requests that the threads of one batch wait for. They run on a loop of their own, where leaving cancels them.

    (A thread that waits for a reply cannot be stopped; a task that does can.)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._ready = threading.Event()
        self._closed = False
        self.over = False
        """The batch came to its end by itself: who still has its context asks the engine directly."""
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="detox-batch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Cancel what is under way, and wait until it has left its seats."""
        with self._lock:
            self._closed = True
            assert self._loop is not None
            assert self._end is not None
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self.over = kind is None

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._end.wait()  # then `asyncio.run` cancels the tasks

    def stream(self, detoxigen: DetoxiGen, prompt: Any, params: DecodingParams) -> Generator[Chunk, None, None]:
        inbox: queue.SimpleQueue[Chunk | BaseException | None] = queue.SimpleQueue()

        async def read() -> None:
            try:
                async with aclosing(detoxigen.astream(prompt, params)) as chunks:
                    async for chunk in chunks:
                        inbox.put(chunk)
            except Exception as error:
                inbox.put(error)

        future = self._start(read())
        future.add_done_callback(lambda _: inbox.put(None))  # also where it was cancelled before it began
        try:
            while True:
                item = inbox.get()
                if item is None:
                    raise RequestCancelledError("the batch was interrupted")
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.generation is not None:
                    return
        finally:
            future.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        with self._lock:
            if self._closed:
                work.close()
                raise RequestCancelledError("the batch was interrupted")
            assert self._loop is not None
            return asyncio.run_coroutine_threadsafe(work, self._loop)


_batch: ContextVar[_Requests | None] = ContextVar("detox_guard_batch", default=None)
"""The batch that this thread works for."""
