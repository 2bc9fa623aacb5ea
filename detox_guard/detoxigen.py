"""Text in, text out: `DetoxiGen`, which users hold. Knows prompts, parameters and replies; no thread, row or step.

Every way of asking makes a `Reply` of each prompt. It prepares the request and assembles the text on the engine's
thread, so that a stop string ends the reply within its step. `_asking` brings its `Chunk`s to whoever waits.
"""

from __future__ import annotations

from contextlib import aclosing, closing
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from detox_guard._asking import aask, ask
from detox_guard._registry import shared_model
from detox_guard._reply import Reply, Speaker
from detox_guard._threads import run_aside
from detox_guard.detoxifiers.base import most_beside
from detox_guard.detoxifiers.resolve import AUTO, as_streams
from detox_guard.detoxifiers.text_view import TextView
from detox_guard.engine import Engine, EngineStats, Scheduler
from detox_guard.engine.backends import runner_of
from detox_guard.errors import DetoxGuardError, InvalidParamsError, NotPicklableError, PromptError
from detox_guard.guard.reply import GuardedReply
from detox_guard.models.load import load_backbone
from detox_guard.settings import DecodingParams, EngineConfig
from detox_guard.text.prompts import Prompt, encode_prompt, with_template_kwargs
from detox_guard.text.template import template_of
from detox_guard.text.tools import knows_tools

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from detox_guard.detoxifiers.resolve import ManySteering
    from detox_guard.detoxifiers.soft_prompt import SteeringStream
    from detox_guard.models.backbone import Backbone
    from detox_guard.results import Chunk, Generation

__all__ = ["DetoxiGen"]


class DetoxiGen:
    """A local language model, steered away from toxicity while it decodes.

    Thread-safe: any number of threads and tasks may call it; they share one running batch. A prompt is a plain string,
    chat messages (`[{"role": …, "content": …}, …]`) or a `ChatPrompt` (messages with tools). `generate`, `stream` and
    their async twins take one, a `DecodingParams`, and single fields of it as keywords:
    `model.generate("Hi", alpha=4.0)`. `as_completed`, `batch` and their twins take many. `chat_template_kwargs` are
    variables of the chat template, as in `ChatPrompt`:
    `model.generate(messages, chat_template_kwargs={"enable_thinking": False})`.
    """

    def __init__(
        self,
        backbone: Backbone,
        streams: Sequence[SteeringStream] = (),
        *,
        params: DecodingParams | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        """`streams` are validated detoxifiers (`detoxifiers.resolve.as_streams`); none serves `alpha=0` only."""
        for name, value, kind in (("params", params, DecodingParams), ("config", config, EngineConfig)):
            if value is not None and not isinstance(value, kind):
                raise InvalidParamsError(name, value, f"a {kind.__name__} or None")
        self.backbone = backbone
        self.streams = tuple(streams)
        self.params = params or (DecodingParams() if streams else DecodingParams(alpha=0.0))
        self.config = config or EngineConfig()
        views = [stream.view(backbone) for stream in self.streams]
        self._beside = most_beside(views)
        self._engine: Engine = run_aside(lambda: Scheduler(runner_of(backbone, views, self.config), self.config))
        texts = (s.detoxifier.text for s in self.streams if isinstance(s.detoxifier, TextView) and s.place == "system")
        self._speaker = Speaker(backbone, self.detoxifier_ids, tuple(texts), self._engine.check)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel | None = None,
        *,
        detoxifier: ManySteering = AUTO,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        params: DecodingParams | None = None,
        config: EngineConfig | None = None,
        **loading: Any,
    ) -> Self:
        """Load a backbone and its detoxifier.

        `model`: hub id, folder, GGUF file, LoRA adapter, a loaded model or `PeftModel` (with `tokenizer`), or None for
        the embedded default (fetched once); "ollama:name" is the file of an Ollama model. `loading`: fields of
        `LoadOptions` (`device`, `dtype`, `device_map`, `quantization_config`, `revision`, …). With `engine="llamacpp"`,
        llama.cpp serves a GGUF file. `detoxifier`: "auto" is the one we ship for the embedded default, else
        one that was trained here for this model, else texts that need no training (`detoxifiers` says which). Or a hub
        id, a folder, a `Detoxifier`, a text (`Detoxifier.from_text`), a `SteeringStream` (signed weight), or several.
        `()` is none at all. `params` are the defaults of every call; a call's own take their place, all but a guard,
        which stays unless the call's own set `guard`.
        Raises `BackboneError`, `DetoxifierError`, `InvalidParamsError`.
        """
        backbone = load_backbone(model, tokenizer=tokenizer, **loading)
        return cls(backbone, as_streams(detoxifier, backbone), params=params, config=config)

    @classmethod
    def shared(
        cls,
        model: str | Path | None = None,
        *,
        detoxifier: str | Path | tuple[()] | None = AUTO,
        config: EngineConfig | None = None,
        **loading: Any,
    ) -> DetoxiGen:
        """The one model of this process for these arguments; loaded at the first call, for all who ask at once.

        Every wrapper that names the same model, detoxifier and `LoadOptions` shares one batch. It lives as long as the
        process, or until it is closed; then the next call loads anew. Raises as `from_pretrained`.
        """
        return shared_model(DetoxiGen.from_pretrained, model, detoxifier=detoxifier, config=config, **loading)

    # -- one prompt

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
        reply = self._prepare(prompt, params, changes)
        return self._chunks(reply)

    async def agenerate(self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any) -> Generation:
        """`generate` without blocking the event loop; cancelling the task frees the seat."""
        async with aclosing(self.astream(prompt, params, **changes)) as chunks:
            return _last([chunk async for chunk in chunks])

    async def astream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` without blocking the event loop; closing the iterator or cancelling the task frees the seat."""
        async with aclosing(aask(self._engine, [partial(self._prepare, prompt, params, changes)])) as said:
            async for _, item in said:
                yield _raised(item)

    # -- many prompts

    def as_completed(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_chunk: Callable[[int, Chunk], object] | None = None,
    ) -> Generator[tuple[int, Any], None, None]:
        """Every reply as soon as it is whole, with the index of its prompt. All are decoded together.

        `params`: one `DecodingParams` for all, or one each. Prompts are prepared as the queue takes them, so any number
        will do. The first error is raised; with `return_exceptions` it is that prompt's result, and the others go on.
        Leaving the loop, an error and Ctrl-C cancel what is under way. `on_chunk(index, chunk)` is called in this
        thread, while the next reply is waited for. Raises as `generate`; bad `prompts` and `params` at once.
        """
        return self._completed(self._prepares(prompts, params, chat_template_kwargs), return_exceptions, on_chunk)

    def aas_completed(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_chunk: Callable[[int, Chunk], object] | None = None,
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """`as_completed` without blocking the event loop; cancelling the task cancels what is under way."""
        return self._acompleted(self._prepares(prompts, params, chat_template_kwargs), return_exceptions, on_chunk)

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
        self, prompts: Sequence[Prompt], params: DecodingParams | Sequence[DecodingParams] | None = None, **how: Any
    ) -> list[Any]:
        """All replies of `as_completed`, in the order of the prompts. Keywords as there."""
        with closing(self.as_completed(prompts, params, **how)) as done:
            return _in_order(list(done))

    async def abatch(
        self, prompts: Sequence[Prompt], params: DecodingParams | Sequence[DecodingParams] | None = None, **how: Any
    ) -> list[Any]:
        """`batch` without blocking the event loop; cancelling the task frees its seats."""
        async with aclosing(self.aas_completed(prompts, params, **how)) as done:
            return _in_order([one async for one in done])

    # -- the rest

    @property
    def model_id(self) -> str:
        """The backbone's hub id, or the base name of its folder or file; never a path."""
        return self.backbone.id

    @property
    def detoxifier_ids(self) -> tuple[str, ...]:
        """One a detoxifier: sign and weight, "text" where it is one, and the start of its SHA-256."""
        return tuple(stream.id for stream in self.streams)

    @property
    def detoxifiers(self) -> tuple[str, ...]:
        """Which detoxifiers serve, in words: what each is, its place and weight, who chose it, and its id."""
        return tuple(map(str, self.streams))

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be decoded from."""
        return self.backbone.has_chat_template

    @property
    def context_window(self) -> int | None:
        """Tokens that prompt and reply may have together when steered; None = no bound known. (A detoxifier of place
        "system" takes those of its text and its message besides.)"""
        most = self._engine.limits.max_positions
        return None if most is None else most - self._beside

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
        return (GuardedReply if params.guard else Reply)(self._speaker, prompt, params)

    def _prepares(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[Callable[[], Reply]]:
        # One text is no batch, though Python takes it for a sequence of letters.
        if isinstance(prompts, str | bytes | dict) or not (
            hasattr(prompts, "__len__") and hasattr(prompts, "__iter__")
        ):
            raise InvalidParamsError("prompts", prompts, "a list of prompts")
        count = len(prompts)
        if params is None or isinstance(params, DecodingParams):
            params = [params] * count  # type: ignore[list-item]
        elif not isinstance(params, list | tuple) or len(params) != count:
            given = f"{len(params)} of them" if isinstance(params, list | tuple) else params
            raise InvalidParamsError("params", given, f"one DecodingParams, or one for each of {count} prompts")
        changes = {"chat_template_kwargs": chat_template_kwargs}
        return [partial(self._prepare, prompt, own, changes) for prompt, own in zip(prompts, params or (), strict=True)]

    def _chunks(self, reply: Reply) -> Generator[Chunk, None, None]:
        with closing(ask(self._engine, [lambda: reply])) as said:
            for _, item in said:
                yield _raised(item)

    def _completed(
        self,
        prepares: list[Callable[[], Reply]],
        return_exceptions: bool,
        on_chunk: Callable[[int, Chunk], object] | None,
    ) -> Generator[tuple[int, Any], None, None]:
        with closing(ask(self._engine, prepares, pieces=on_chunk is not None)) as said:
            for index, item in said:
                if (result := _result(index, item, return_exceptions, on_chunk)) is not None:
                    yield index, result

    async def _acompleted(
        self,
        prepares: list[Callable[[], Reply]],
        return_exceptions: bool,
        on_chunk: Callable[[int, Chunk], object] | None,
    ) -> AsyncGenerator[tuple[int, Any], None]:
        async with aclosing(aask(self._engine, prepares, pieces=on_chunk is not None)) as said:
            async for index, item in said:
                if (result := _result(index, item, return_exceptions, on_chunk)) is not None:
                    yield index, result


def _raised(item: Chunk | Exception) -> Chunk:
    if isinstance(item, Exception):
        raise item
    return item


def _last(chunks: list[Chunk]) -> Generation:
    generation = chunks[-1].generation
    assert generation is not None, "a stream ends with its generation, or raises"
    return generation


def _result(
    index: int, item: Chunk | Exception, return_exceptions: bool, on_chunk: Callable[[int, Chunk], object] | None
) -> Generation | DetoxGuardError | None:
    """What ends a reply; None for a piece of it."""
    if return_exceptions and isinstance(item, DetoxGuardError):
        return item
    chunk = _raised(item)
    if on_chunk is not None:
        on_chunk(index, chunk)
    return chunk.generation


def _in_order(done: list[tuple[int, Any]]) -> list[Any]:
    return [result for _, result in sorted(done, key=itemgetter(0))]
