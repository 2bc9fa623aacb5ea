"""Text in, text out: `DetoxiGen`, which users hold. Knows callers and threads; leaves rows and steps to the engine.

Every public way of asking goes through one `Reply`: it prepares the request, assembles the text on the engine's
thread (so that a stop string ends the reply within its step) and hands `Chunk`s to whoever waits.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from detox_guard._registry import shared_guard
from detox_guard._reply import Reply
from detox_guard._threads import run_aside, run_off_loop
from detox_guard.detoxifiers.soft_prompt import as_streams
from detox_guard.engine import Engine, EngineStats, StreamSpec
from detox_guard.engine.torch.runner import torch_runner
from detox_guard.errors import (
    DetoxGuardError,
    EngineBusyError,
    EngineError,
    InvalidParamsError,
    NotPicklableError,
    PromptError,
    RequestCancelledError,
)
from detox_guard.guard.reply import GuardedReply
from detox_guard.models.backbone import load_backbone
from detox_guard.settings import DecodingParams, EngineConfig
from detox_guard.text.prompts import Prompt, encode_prompt, with_template_kwargs
from detox_guard.text.template import template_of
from detox_guard.text.tools import knows_tools

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream
    from detox_guard.engine import Request
    from detox_guard.models.backbone import Backbone
    from detox_guard.results import Chunk, Generation

    Steering = str | Path | Detoxifier | SteeringStream
    ManySteering = Steering | Sequence[Steering] | None

__all__ = ["DetoxiGen"]

_BREATH_S = 1.0
"""How long one wait for a chunk is at most."""


class DetoxiGen:
    """A local language model, steered away from toxicity while it decodes.

    Thread-safe: any number of threads and tasks may call it; they share one running batch. `generate`, `stream`,
    `batch` and their async twins take a plain string, chat messages (`[{"role": …, "content": …}, …]`) or a
    `ChatPrompt` (messages with tools), a `DecodingParams`, and single fields of it as keywords:
    `guard.generate("Hi", alpha=4.0)`. `chat_template_kwargs` are variables of the chat template, as in `ChatPrompt`:
    `guard.generate(messages, chat_template_kwargs={"enable_thinking": False})`.
    """

    def __init__(
        self,
        backbone: Backbone,
        streams: Sequence[SteeringStream] = (),
        *,
        params: DecodingParams | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        """`streams` are validated detoxifiers (`detoxifiers.soft_prompt.as_streams`); none serves `alpha=0` only."""
        for name, value, kind in (("params", params, DecodingParams), ("config", config, EngineConfig)):
            if value is not None and not isinstance(value, kind):
                raise InvalidParamsError(name, value, f"a {kind.__name__} or None")
        self.backbone = backbone
        self.streams = tuple(streams)
        self.params = params or (DecodingParams() if streams else DecodingParams(alpha=0.0))
        self.config = config or EngineConfig()
        specs = [
            StreamSpec(s.detoxifier.embeddings, s.weight, s.detoxifier.card.position == "front") for s in self.streams
        ]
        self._engine: Engine = run_aside(lambda: Engine(torch_runner(backbone, specs, self.config), self.config))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel | None = None,
        *,
        detoxifier: ManySteering = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        params: DecodingParams | None = None,
        config: EngineConfig | None = None,
    ) -> Self:
        """Load a backbone and its detoxifier.

        `model`: hub id, folder, GGUF file, a loaded model (with `tokenizer`), or None for the embedded default (fetched
        once). `detoxifier`: hub id, folder, `Detoxifier`, `SteeringStream` (signed weight), or several; None is the one
        we ship, for the embedded default only; `()` is none at all. `params` are the defaults of every call; a call's
        own take their place, all but a guard, which stays unless the call's own set `guard`.
        Raises `BackboneError`, `DetoxifierError`, `InvalidParamsError`.
        """
        backbone = run_aside(
            lambda: load_backbone(
                model,
                tokenizer=tokenizer,
                device=device,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        )
        streams = () if detoxifier == () else as_streams(detoxifier, backbone)
        return cls(backbone, streams, params=params, config=config)

    @classmethod
    def shared(
        cls,
        model: str | Path | None = None,
        *,
        detoxifier: str | Path | tuple[()] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        config: EngineConfig | None = None,
    ) -> DetoxiGen:
        """The one guard of this process for these arguments; loaded at the first call, for all who ask at once.

        Every wrapper that names the same model, detoxifier and device so shares one batch. It lives as long as the
        process, or until it is closed; then the next call loads anew. Raises as `from_pretrained`.
        """
        return shared_guard(
            DetoxiGen.from_pretrained,
            model,
            detoxifier=detoxifier,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            config=config,
        )

    # -- sync

    def generate(self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any) -> Generation:
        """The whole reply. Raises `PromptError`, `InvalidParamsError`, `EngineError`.

        Where the queue is full, this waits for its turn (unless `EngineConfig.when_full` says otherwise), as every way
        of asking does.
        """
        with closing(self.stream(prompt, params, **changes)) as chunks:
            return _last(list(chunks))

    def stream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> Generator[Chunk, None, None]:
        """The reply as it is decoded. Closing the iterator (or leaving its loop and dropping it) frees the seat.

        The prompt is checked now; decoding starts with the first `next`.
        """
        self._engine.check_open()
        return self._iterate(self._prepare(prompt, params, changes))

    @overload
    def batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: Literal[False] = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Generation]: ...

    @overload
    def batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Generation | DetoxGuardError]: ...

    def batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """All replies, in order, decoded together. One `DecodingParams` for all, or one each.

        With `return_exceptions`, a request that fails gives its error in its place; otherwise the first error is
        raised and the rest is cancelled.
        """
        return self._batch(prompts, params, return_exceptions, chat_template_kwargs, _Cancelling())

    def _batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None,
        return_exceptions: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
        cancelling: _Cancelling,
    ) -> list[Any]:
        many = _listed(prompts)
        results: list[Generation | DetoxGuardError | None] = [None] * len(many)
        under_way: deque[tuple[int, Reply, _Inbox]] = deque()

        def settle() -> None:
            index, reply, inbox = under_way[0]
            try:
                results[index] = _last(list(self._read(inbox, cancelling.check)))
            except DetoxGuardError as error:
                cancelling.check()
                if not return_exceptions:
                    raise
                results[index] = error
            cancelling.forget(reply)
            under_way.popleft()

        def take_place() -> None:
            while True:
                try:
                    return self._take_place(cancelling.check)
                except EngineBusyError:
                    # A queue that refuses is waited for, as long as there is something of our own to wait for.
                    if not under_way:
                        raise
                settle()

        try:
            for index, (prompt, own) in enumerate(zip(many, self._spread(params, len(many)), strict=True)):
                # What is done by now need not be kept as chunks.
                while under_way and under_way[0][2].over:
                    settle()
                try:
                    cancelling.check()
                    take_place()
                    with self._placed():
                        reply = self._prepare(prompt, own, {"chat_template_kwargs": chat_template_kwargs})
                        cancelling.watch(reply)
                    inbox = _Inbox()
                    self._submit(reply, inbox.put)
                    under_way.append((index, reply, inbox))
                except DetoxGuardError as error:
                    cancelling.check()
                    if not return_exceptions:
                        raise
                    results[index] = error
            while under_way:
                settle()
        finally:
            cancelling.cancel()
        return results

    # -- async

    async def agenerate(self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any) -> Generation:
        """`generate` without blocking the event loop; cancelling the task frees the seat."""
        async with aclosing(self.astream(prompt, params, **changes)) as chunks:
            return _last([chunk async for chunk in chunks])

    async def astream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` without blocking the event loop; closing the iterator or cancelling the task frees the seat."""
        self._not_in_a_hook()
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        await self._engine.take_place_async()
        with self._placed():
            # Tokenizing a long prompt takes a while: not on the loop.
            reply = await run_off_loop(self._prepare, prompt, params, changes)

        def put(item: Chunk | Exception) -> None:
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, item)
            except RuntimeError:  # the loop is closed: nobody waits any more
                reply.request.cancel()

        try:
            self._submit(reply, put)
            while True:
                chunk = _unwrap(await inbox.get())
                yield chunk
                if chunk.generation:
                    return
        finally:
            reply.request.cancel()

    async def abatch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """`batch` without blocking the event loop; cancelling the task frees its seats."""
        cancelling = _Cancelling(asyncio.get_running_loop().is_closed)
        # A thread of its own: the loop's pool is small, and others wait for it.
        pool = ThreadPoolExecutor(1, "detox-guard-batch")
        try:
            return await run_off_loop(
                self._batch, prompts, params, return_exceptions, chat_template_kwargs, cancelling, pool=pool
            )
        finally:
            cancelling.cancel()
            pool.shutdown(wait=False)

    # -- the rest

    @property
    def model_id(self) -> str:
        """The backbone's hub id, or the base name of its folder or file; never a path."""
        return self.backbone.id

    @property
    def detoxifier_ids(self) -> tuple[str, ...]:
        """One a stream: sign and weight, and the start of the soft prompt's SHA-256."""
        return tuple(f"{stream.weight:+g}:{stream.detoxifier.sha256[:12]}" for stream in self.streams)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be decoded from."""
        return self.backbone.has_chat_template

    @property
    def context_window(self) -> int | None:
        """Tokens that prompt and reply may have together when steered; None = no bound known."""
        virtual = max((stream.detoxifier.card.virtual_tokens for stream in self.streams), default=0)
        most = self._engine.max_positions
        return None if most is None else most - virtual

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by itself, without the special tokens that a prompt begins with. May be empty."""
        if not isinstance(text, str):
            raise PromptError("text", text, "a string")
        try:
            ids: list[int] = self.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        except (TypeError, UnicodeEncodeError) as error:
            raise PromptError("text", text, f"text that can be written as UTF-8: {error}") from None
        return ids

    def count_tokens(self, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> int:
        """How many prompt tokens the backbone would read."""
        return len(encode_prompt(self.backbone, with_template_kwargs(prompt, chat_template_kwargs)))

    @property
    def supports_tools(self) -> bool:
        """Whether the backbone's chat template renders tools itself; if not, plain messages tell the model of them."""
        return knows_tools(template_of(self.backbone))

    def stats(self) -> EngineStats:
        """Counters of the engine and what it holds now."""
        return self._engine.stats()

    @property
    def closed(self) -> bool:
        """Whether `close` was called: it answers nobody any more."""
        return self._engine.closed

    def close(self) -> None:
        """Stop the engine's thread; requests under way, and those that wait for a place, fail with `EngineClosedError`.

        Idempotent; also done when nobody holds this object. A forked child's copy is closed if it worked before.
        """
        self._engine.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Itself: a copied chain or index shares the engine."""
        return self

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        raise NotPicklableError(
            f"the engine of {self.model_id!r} belongs to its process", hint="name the model, and load it over there"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, prompt: Prompt, params: DecodingParams | None, changes: dict[str, Any]) -> Reply:
        if params is not None and not isinstance(params, DecodingParams):
            raise InvalidParamsError("params", params, "a DecodingParams or None")
        if params is None:
            params = self.params
        elif self.params.guard is not None and "guard" not in params.model_fields_set:
            params = params.replace(guard=self.params.guard)
        changes = dict(changes)
        prompt = with_template_kwargs(prompt, changes.pop("chat_template_kwargs", None))
        params = params.replace(**changes) if changes else params
        kind = GuardedReply if params.guard else Reply
        return kind(self.backbone, prompt, params, self.detoxifier_ids, self._check_fits)

    def _check_fits(self, prompt_ids: list[int], params: DecodingParams) -> None:
        raised = params.guard is not None and params.guard.most_alpha > 0 and bool(self.streams)
        self._engine.check(prompt_ids, params, params.alpha > 0 or raised)

    def _take_place(self, check: Callable[[], None] | None = None) -> None:
        self._not_in_a_hook()
        self._engine.take_place(check)

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """What fails in here gives its place in the queue back."""
        try:
            yield
        except BaseException:
            self._engine.give_back()
            raise

    def _submit(self, reply: Reply, put: Callable[[Chunk | Exception], object]) -> None:
        """Hand it to the engine with the place that was taken; one whose prompt was refused is over already."""
        reply.put = put
        if reply.refused:
            self._engine.give_back()
            reply.on_finish("guard")
        else:
            self._engine.submit(reply.request, placed=True)

    def _not_in_a_hook(self) -> None:
        """Raise `EngineError` in a hook of the engine's own thread, which would wait for itself."""
        if self._engine.is_own_thread:
            raise EngineError(
                "asked from the engine's own thread", hint="a hook must be quick: ask from another thread"
            )

    def _spread(self, params: DecodingParams | Sequence[DecodingParams] | None, count: int) -> Sequence[Any]:
        if params is None or isinstance(params, DecodingParams):
            return [params] * count
        if not isinstance(params, list | tuple) or len(params) != count:
            given = f"{len(params)} of them" if isinstance(params, list | tuple) else params
            raise InvalidParamsError("params", given, f"one DecodingParams, or one for each of {count} prompts")
        return params

    def _iterate(self, reply: Reply) -> Generator[Chunk, None, None]:
        inbox = _Inbox()
        try:
            self._take_place()
            self._submit(reply, inbox.put)
            yield from self._read(inbox)
        finally:
            reply.request.cancel()

    def _read(self, inbox: _Inbox, check: Callable[[], None] | None = None) -> Generator[Chunk, None, None]:
        """Chunks up to the last one. `check` is called now and then while there is none, and may raise."""

        def look_up() -> None:
            self._engine.check_alive()
            if check is not None:
                check()

        while True:
            chunk = _unwrap(inbox.get(look_up))
            yield chunk
            if chunk.generation:
                return


class _Inbox:
    """What one reply has said that nobody has read yet. The engine's thread puts, one other thread gets."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        self.over = False

    def put(self, item: Chunk | Exception) -> None:
        self._items.put(item)
        self.over = isinstance(item, Exception) or item.generation is not None

    def get(self, look_up: Callable[[], None]) -> Chunk | Exception:
        """The next item. `look_up` is called before each wait, which is short: where a lock cannot be interrupted,
        Ctrl-C comes through in between."""
        while True:
            with suppress(queue.Empty):
                return self._items.get_nowait()
            look_up()
            with suppress(queue.Empty):
                return self._items.get(timeout=_BREATH_S)


def _listed(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """A batch's prompts. One text is no batch, though Python takes it for a sequence of letters."""
    if isinstance(prompts, str | bytes | dict) or not (hasattr(prompts, "__len__") and hasattr(prompts, "__iter__")):
        raise InvalidParamsError("prompts", prompts, "a list of prompts")
    return prompts


def _unwrap(item: Chunk | Exception) -> Chunk:
    if isinstance(item, Exception):
        raise item
    return item


def _last(chunks: list[Chunk]) -> Generation:
    generation = chunks[-1].generation
    assert generation is not None, "a stream ends with its generation, or raises"
    return generation


class _Cancelling:
    """Cancels the requests of a batch, from any thread; after that it has no more of them."""

    def __init__(self, is_gone: Callable[[], bool] | None = None) -> None:
        """`is_gone()`: nobody waits for the batch any more, as if it were cancelled."""
        self._lock = threading.Lock()
        self._is_gone = is_gone
        self._requests: set[Request] = set()
        self._cancelled = False

    def check(self) -> None:
        """Raises `RequestCancelledError` if it is too late."""
        if self._cancelled or (self._is_gone is not None and self._is_gone()):
            raise RequestCancelledError("the batch was cancelled")

    def watch(self, reply: Reply) -> None:
        """As `check`; else the request is one of those."""
        with self._lock:
            self.check()
            self._requests.add(reply.request)

    def forget(self, reply: Reply) -> None:
        with self._lock:
            self._requests.discard(reply.request)

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            for request in self._requests:
                request.cancel()
