"""Decoding options that reach an LLM through code that passes none: query engines, synthesizers, agents.

Knows blocks, the frames and contexts they are in, and streams that are read behind them; knows no LLM.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import AsyncGenerator, Generator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.base_selector import BaseSelector
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.evaluation import BatchEvalRunner
from llama_index.core.evaluation.base import BaseEvaluator
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.query import QueryEndEvent
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.question_gen.types import BaseQuestionGenerator
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import TransformComponent
from llama_index.core.types import BasePydanticProgram
from llama_index_instrumentation import get_dispatcher

from detox_guard import DecodingParams, DetoxGuardError, Grammar, GuardPolicy, InvalidParamsError, Rung

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from types import FrameType

    from llama_index.core.instrumentation.events import BaseEvent

    from detox_guard import Generation

__all__ = ["Scope", "aheld", "current_scope", "detox_options", "entered", "held", "made_here", "read_options"]

Item = TypeVar("Item")


@dataclass(eq=False)
class Scope:
    """Options in force, and the lists that collect every reply decoded under them."""

    options: Mapping[str, Any] = field(default_factory=dict)
    collectors: tuple[list[Generation], ...] = ()
    outer: Scope | None = None
    failures: tuple[list[DetoxGuardError], ...] = ()
    """Collect what calls under it raised, for a caller of LlamaIndex's that tells of errors as of an answer."""
    left: bool = False
    """It was left in another context than it was entered in, where it could not be taken out of force."""

    def within(self, other: Scope) -> bool:
        return self is other or (self.outer is not None and self.outer.within(other))

    def __bool__(self) -> bool:
        return bool(self.options or self.collectors or self.failures)


_scope: ContextVar[Scope | None] = ContextVar("detox_guard_llama_index_scope", default=None)
_blocks: dict[FrameType, list[Scope]] = {}
"""Open blocks by the frame that runs them. A generator's frame stays the same in whatever context it is stepped."""


def current_scope() -> Scope:
    """That of the innermost block around the caller: on the stack, or in the context that its task or thread copied."""
    own = _scope.get()
    while own is not None and own.left:
        own = own.outer
    block = _block_around(sys._getframe(1))
    if block is not None and not (own is not None and own.within(block)):
        own = block
    return own or Scope()


class entered:
    """Put a scope in force for the block. Leaving it never raises, in whatever context."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._open: list[tuple[Scope, FrameType, Token[Scope | None]]] = []

    def __enter__(self) -> Any:
        return self._enter(self._scope, sys._getframe(1))

    def __exit__(self, *_: object) -> None:
        scope, frame, token = self._open.pop()
        mine = _blocks.get(frame, [])
        if scope in mine:
            mine.remove(scope)
        if not mine:
            _blocks.pop(frame, None)
        try:
            _scope.reset(token)
        except ValueError:
            scope.left = True

    def _enter(self, scope: Scope, frame: FrameType) -> Scope:
        self._open.append((scope, frame, _scope.set(scope)))
        _blocks.setdefault(frame, []).append(scope)
        return scope


class detox_options(entered):
    """Options (fields of `DecodingParams`) of every `DetoxiGenLLM` call made inside the block, in this thread or task.

    An answer that is streamed belongs to the block in which it was asked for, whenever, wherever and in whatever
    context it is read; so does a coroutine that was made there: of an LLM, a synthesizer, a query or chat engine, a
    retriever, selector, question generator, evaluator, program, postprocessor, extractor or ingestion pipeline. (For
    that, a block puts a wrapper around these methods of LlamaIndex's classes and of their subclasses that exist when it
    is entered; without options in force it does nothing. A coroutine function of your own begins when it is awaited:
    open the block in it.) A thread that you start yourself needs `contextvars.copy_context().run`.

    Yields a list that receives each reply once it is complete. Inner blocks win over outer ones, and what a call
    passes itself wins over both::

        with detox_options(alpha=4.0, seed=7) as replies:
            query_engine.query("…")

    Raises `InvalidParamsError` for an unknown or bad option.
    """

    def __init__(self, **options: Any) -> None:
        asked = DecodingParams(**read_options(options))
        super().__init__(Scope({name: getattr(asked, name) for name in options}))

    def __enter__(self) -> list[Generation]:
        _hold_streams()
        _hold_methods()
        outer, replies = current_scope(), []  # type: ignore[var-annotated]
        options, collectors = {**outer.options, **self._scope.options}, (*outer.collectors, replies)
        self._enter(Scope(options, collectors, outer, outer.failures), sys._getframe(1))
        return replies


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, a guard or a grammar that is written as a dict as what it says. Raises `InvalidParamsError`."""
    read = dict(options)
    kinds: tuple[tuple[str, Any], ...] = (("guard", GuardPolicy), ("grammar", Grammar))
    for name, kind in kinds:
        if isinstance(value := read.get(name), Mapping):
            read[name] = _read(name, kind, value)
    return read


def _read(name: str, kind: Any, value: Mapping[str, Any]) -> Any:
    if not all(isinstance(key, str) for key in value):
        raise InvalidParamsError(name, value, "fields by their names")
    fields = dict(value)
    if isinstance(ladder := fields.get("ladder"), list | tuple):
        rungs = enumerate(ladder)
        fields["ladder"] = [_read(f"{name}.ladder.{i}", Rung, r) if isinstance(r, Mapping) else r for i, r in rungs]
    try:
        return kind(**fields)
    except InvalidParamsError as error:
        raise InvalidParamsError(f"{name}.{error.field}", error.value, error.bound, hint=error.hint) from None


# -- streams and coroutines that go on behind the block


def held(scope: Scope, stream: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The stream, each of its steps under `scope`."""
    try:
        while True:
            with entered(scope):
                try:
                    item = next(stream)
                except StopIteration:
                    return
            yield item
    finally:
        with entered(scope):
            stream.close()


async def aheld(scope: Scope, stream: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """The stream, each of its steps under `scope`."""
    try:
        while True:
            with entered(scope):
                try:
                    item = await anext(stream)
                except StopAsyncIteration:
                    return
            yield item
    finally:
        with entered(scope):
            await stream.aclose()


def made_here(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, its coroutine and its stream under the options in force where it was called, wherever they are
    awaited and read."""

    async def under(scope: Scope, coroutine: Coroutine[Any, Any, Any]) -> Any:
        with entered(scope):
            answer = await coroutine
        return _kept(scope, answer)

    @functools.wraps(method)
    def make(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope, answer = current_scope(), method.__get__(self, type(self))(*args, **kwargs)
        if not scope:
            return answer
        return under(scope, answer) if inspect.iscoroutine(answer) else _kept(scope, answer)

    mark = getattr(inspect, "markcoroutinefunction", None)  # Python 3.12
    return mark(make) if mark and inspect.iscoroutinefunction(method) else make


def _kept(scope: Scope, answer: Any) -> Any:
    if isinstance(answer, Generator):
        return held(scope, answer)
    return aheld(scope, answer) if isinstance(answer, AsyncGenerator) else answer


class _StreamsHold(BaseEventHandler):
    """Upstream's refining synthesizers ask their LLM only while their stream is read. As soon as there is such a
    stream, it is put under the options in force."""

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        if not isinstance(event, QueryEndEvent | SynthesizeEndEvent) or not (scope := current_scope()):
            return
        response: Any = event.response
        stream = getattr(response, "response_gen", None)
        if isinstance(response, StreamingResponse) and isinstance(stream, Generator):
            if getattr(stream, "gi_code", None) is not held.__code__:
                response.response_gen = held(scope, stream)
        elif isinstance(response, AsyncStreamingResponse) and isinstance(stream, AsyncGenerator):  # noqa: SIM102
            if getattr(stream, "ag_code", None) is not aheld.__code__:
                response.response_gen = aheld(scope, stream)


_streams_hold = _StreamsHold()


def _hold_streams() -> None:
    handlers = get_dispatcher().event_handlers
    if not any(handler is _streams_hold for handler in handlers):
        handlers.append(_streams_hold)


_asking: dict[type, tuple[str, ...]] = {
    BaseQueryEngine: ("aquery", "aretrieve", "asynthesize"),
    BaseSynthesizer: (
        *("asynthesize", "get_response", "aget_response"),
        *("get_response_from_messages", "aget_response_from_messages"),
    ),
    BaseChatEngine: ("achat", "astream_chat"),
    BaseRetriever: ("aretrieve",),
    BaseSelector: ("aselect",),
    BaseQuestionGenerator: ("agenerate",),
    BaseEvaluator: ("aevaluate", "aevaluate_response"),
    BasePydanticProgram: ("acall", "stream_call", "astream_call"),
    BaseNodePostprocessor: ("apostprocess_nodes",),
    BatchEvalRunner: ("aevaluate_queries", "aevaluate_responses", "aevaluate_response_strs"),
    IngestionPipeline: ("arun",),
    TransformComponent: ("acall", "aextract", "aprocess_nodes", "aget_nodes_from_documents"),
}
"""LlamaIndex's base classes, and their methods whose coroutine or stream asks an LLM later than it was called."""
_reached: dict[type, WeakSet[type]] = {base: WeakSet() for base in _asking}


def _hold_methods() -> None:
    """A coroutine begins when it is awaited, and a generator when it is read: either may be behind the block that it
    was made in. Subclasses override these methods, so each loaded one is reached, once."""
    for base, names in _asking.items():
        for cls in _and_subclasses(base):
            if cls in _reached[base]:
                continue
            for name in names:
                method = vars(cls).get(name)
                if callable(method) and not isinstance(method, staticmethod):
                    setattr(cls, name, made_here(method))
            _reached[base].add(cls)


def _and_subclasses(cls: type) -> Iterator[type]:
    yield cls
    below: type
    for below in type.__subclasses__(cls):
        yield from _and_subclasses(below)


def _block_around(frame: FrameType | None) -> Scope | None:
    """The innermost block that is open in a caller. A task has its own callers: what runs its loop is none of them."""
    while frame is not None and frame.f_globals.get("__name__") != "asyncio.events":
        if scopes := _blocks.get(frame):
            return scopes[-1]
        frame = frame.f_back
    return None
