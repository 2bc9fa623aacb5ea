"""Text in, text out: `DetoxiGen`, which users hold. Knows text and traces; leaves rows and steps to the engine.

Every public way of asking goes through one `_Reply`: it prepares the request, assembles the text on the engine's
thread (so that a stop string ends the reply within its step) and hands `Chunk`s to whoever waits.
"""

from __future__ import annotations

import asyncio
import queue
import secrets
from collections import deque
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from detox_guard.backbone import Backbone, load_backbone
from detox_guard.detoxifier import as_streams
from detox_guard.engine import Engine, EngineStats, Finish, Request, StreamSpec, TokenConstraint, TokenStep
from detox_guard.errors import DetoxGuardError, EngineBusyError, InvalidParamsError
from detox_guard.params import DecodingParams, EngineConfig
from detox_guard.text import Prompt, StopMatcher, TextStream, encode_prompt, template_of
from detox_guard.tools import knows_tools
from detox_guard.trace import TokenTrace, Trace

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from detox_guard.detoxifier import Detoxifier, SteeringStream

    Steering = str | Path | Detoxifier | SteeringStream
    ManySteering = Steering | Sequence[Steering] | None

__all__ = ["Chunk", "DetoxiGen", "Generation", "Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. Virtual tokens are not counted: the caller neither wrote nor reads them."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Generation:
    """A whole reply. `finish_reason`: "stop" (end token, stop string or stop id, or the end of a grammar) or
    "length" (`max_new_tokens` reached; under a grammar the text is then cut short, no whole text of it)."""

    text: str
    finish_reason: Finish
    usage: Usage
    seed: int
    """The seed that repeats this reply, drawn if none was given."""
    trace: Trace | None
    """None if `DecodingParams.trace` is off."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed reply. The last one carries the whole `generation`; its own `text` may be empty."""

    text: str
    generation: Generation | None = None

    @property
    def finish_reason(self) -> Finish | None:
        """None until the last chunk."""
        return self.generation.finish_reason if self.generation else None

    def __str__(self) -> str:
        return self.text


class DetoxiGen:
    """A local language model, steered away from toxicity while it decodes.

    Thread-safe: any number of threads and tasks may call it; they share one running batch. `generate`, `stream`,
    `batch` and their async twins take a plain string, chat messages (`[{"role": …, "content": …}, …]`) or a
    `ChatPrompt` (messages with tools), a `DecodingParams`, and single fields of it as keywords:
    `guard.generate("Hi", alpha=3.0)`.
    """

    def __init__(
        self,
        backbone: Backbone,
        streams: Sequence[SteeringStream] = (),
        *,
        params: DecodingParams | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        """`streams` are validated detoxifiers (`detox_guard.detoxifier.as_streams`); none serves `alpha=0` only."""
        self.backbone = backbone
        self.streams = tuple(streams)
        self.params = params or DecodingParams(alpha=2.0 if streams else 0.0)
        self.config = config or EngineConfig()
        specs = [
            StreamSpec(s.detoxifier.embeddings, s.weight, s.detoxifier.card.position == "front") for s in self.streams
        ]
        self._engine = Engine(backbone, specs, self.config)

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
        we ship, for the embedded default only; `()` is none at all. `params` are the defaults of every call.
        Raises `BackboneError`, `DetoxifierError`, `InvalidParamsError`.
        """
        backbone = load_backbone(
            model,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        streams = () if detoxifier == () else as_streams(detoxifier, backbone)
        return cls(backbone, streams, params=params, config=config)

    # -- sync

    def generate(self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any) -> Generation:
        """The whole reply. Raises `PromptError`, `InvalidParamsError`, `EngineError`."""
        with closing(self.stream(prompt, params, **changes)) as chunks:
            return _last(list(chunks))

    def stream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> Generator[Chunk, None, None]:
        """The reply as it is decoded. Closing the iterator (or leaving its loop and dropping it) frees the seat.

        The prompt is checked now; decoding starts with the first `next`.
        """
        reply = self._prepare(prompt, params, changes)
        return self._iterate(reply)

    @overload
    def batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: Literal[False] = False,
    ) -> list[Generation]: ...

    @overload
    def batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool,
    ) -> list[Generation | DetoxGuardError]: ...

    def batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """All replies, in order, decoded together. One `DecodingParams` for all, or one each.

        With `return_exceptions`, a request that fails gives its error in its place; otherwise the first error is
        raised and the rest is cancelled.
        """
        results: list[Generation | DetoxGuardError | None] = [None] * len(prompts)
        under_way: deque[tuple[int, Generator[Chunk, None, None], _Reply]] = deque()

        def settle() -> None:
            index, chunks, _ = under_way[0]
            try:
                results[index] = _last(list(chunks))
            except DetoxGuardError as error:
                if not return_exceptions:
                    raise
                results[index] = error
            under_way.popleft()

        try:
            for index, (prompt, own) in enumerate(zip(prompts, self._spread(params, len(prompts)), strict=True)):
                try:
                    reply = self._prepare(prompt, own, {})
                    while not self._try_submit(reply):
                        settle()
                    under_way.append((index, self._iterate(reply, submitted=True), reply))
                except DetoxGuardError as error:
                    if not return_exceptions:
                        raise
                    results[index] = error
            while under_way:
                settle()
        finally:
            for _, _, reply in under_way:
                reply.request.cancel()
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
        # Tokenizing a long prompt takes a while: not on the loop.
        reply = await asyncio.to_thread(self._prepare, prompt, params, changes)
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        reply.put = lambda item: loop.call_soon_threadsafe(inbox.put_nowait, item)
        try:
            self._engine.submit(reply.request)
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
    ) -> list[Any]:
        """`batch` without blocking the event loop."""
        return await _in_thread(lambda: self.batch(prompts, params, return_exceptions=return_exceptions))

    # -- the rest

    def count_tokens(self, prompt: Prompt) -> int:
        """How many prompt tokens the backbone would read."""
        return len(encode_prompt(self.backbone, prompt))

    @property
    def supports_tools(self) -> bool:
        """Whether the backbone's chat template renders tools itself; if not, plain messages tell the model of them."""
        return knows_tools(template_of(self.backbone))

    def stats(self) -> EngineStats:
        """Counters of the engine and what it holds now."""
        return self._engine.stats()

    def close(self) -> None:
        """Stop the engine's thread; requests under way fail. Idempotent; also done when nobody holds this object."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, prompt: Prompt, params: DecodingParams | None, changes: dict[str, Any]) -> _Reply:
        if params is not None and not isinstance(params, DecodingParams):
            raise InvalidParamsError("params", params, "a DecodingParams or None")
        params = params or self.params
        return _Reply(self.backbone, prompt, params.replace(**changes) if changes else params)

    def _spread(self, params: DecodingParams | Sequence[DecodingParams] | None, count: int) -> Sequence[Any]:
        if params is None or isinstance(params, DecodingParams):
            return [params] * count
        if len(params) != count:
            raise InvalidParamsError("params", f"{len(params)} of them", f"one, or one for each of {count} prompts")
        return params

    def _try_submit(self, reply: _Reply) -> bool:
        reply.put = reply.inbox.put
        try:
            self._engine.submit(reply.request)
        except EngineBusyError:
            return False
        return True

    def _iterate(self, reply: _Reply, *, submitted: bool = False) -> Generator[Chunk, None, None]:
        try:
            if not submitted:
                reply.put = reply.inbox.put
                self._engine.submit(reply.request)
            while True:
                chunk = _unwrap(reply.inbox.get())
                yield chunk
                if chunk.generation:
                    return
        finally:
            reply.request.cancel()


class _Reply:
    """One request's text. An engine `Sink`: its `on_…` methods run on the engine's thread."""

    def __init__(self, backbone: Backbone, prompt: Prompt, params: DecodingParams) -> None:
        prompt_ids = encode_prompt(backbone, prompt)
        end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else backbone.eos_token_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self.request = Request(prompt_ids, params, seed, end_ids, self, constraint=_constraint(params, backbone))
        self.inbox: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        self.put: Callable[[Chunk | Exception], object] = self.inbox.put
        self._tokenizer = backbone.tokenizer
        self._detokenizer = TextStream(backbone.tokenizer, prompt_ids)
        self._matcher = StopMatcher(params.stop)
        self._pieces: list[str] = []
        self._steps: list[tuple[TokenStep, str]] = []
        self._tokens = 0

    def on_token(self, step: TokenStep) -> Literal["stop"] | None:
        text = self._detokenizer.push(step.token_id)
        self._tokens += 1
        if self.request.params.trace:
            self._steps.append((step, text))
        self._emit(self._matcher.push(text))
        return "stop" if self._matcher.stopped else None

    def on_finish(self, reason: Finish) -> None:
        tail = self._matcher.flush()
        if tail:
            self._pieces.append(tail)
        text = "".join(self._pieces)
        usage = Usage(len(self.request.prompt_ids), self._tokens)
        self.put(Chunk(tail, Generation(text, reason, usage, self.request.seed, self._trace(len(text)))))

    def on_error(self, error: Exception) -> None:
        self.put(error)

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.put(Chunk(text))

    def _trace(self, length: int) -> Trace | None:
        """Every token's figures; their texts joined are the reply's, so a stop string is cut off here too."""
        if not self.request.params.trace:
            return None
        tokens = []
        for step, text in self._steps:
            cut = text[: max(0, length)]
            length -= len(text)
            preferred = str(self._tokenizer.decode([step.preferred_id], clean_up_tokenization_spaces=False))
            tokens.append(
                TokenTrace(
                    text=cut,
                    token_id=step.token_id,
                    p_before=step.p_before,
                    p_after=step.p_after,
                    kl_detoxifier=step.kl_detoxifier,
                    kl_steering=step.kl_steering,
                    clipped_mass=step.clipped_mass,
                    fallback=step.fallback,
                    preferred=preferred,
                    preferred_id=step.preferred_id,
                    preferred_p=step.preferred_p,
                )
            )
        return Trace(tuple(tokens))


def _constraint(params: DecodingParams, backbone: Backbone) -> TokenConstraint | None:
    if params.grammar is None:
        return None
    from detox_guard.constraint import compile_grammar

    return compile_grammar(params.grammar, backbone, params.max_new_tokens)


def _unwrap(item: Chunk | Exception) -> Chunk:
    if isinstance(item, Exception):
        raise item
    return item


def _last(chunks: list[Chunk]) -> Generation:
    generation = chunks[-1].generation
    assert generation is not None, "a stream ends with its generation, or raises"
    return generation


async def _in_thread(work: Callable[[], list[Any]]) -> list[Any]:
    return await asyncio.to_thread(work)
