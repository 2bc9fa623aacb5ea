"""For tests of programs that use detox-guard: a scripted model and a scripted scorer. Knows no weights, no tokenizer.

`ScriptedDetoxiGen` has the surface of `DetoxiGen`, so it goes wherever one goes: `ChatDetoxiGen(engine=…)` in
LangChain, `DetoxiGenLLM(engine=…)` in LlamaIndex. It says what it is told to and keeps what it was asked::

    from detox_guard.testing import ScriptedDetoxiGen

    model = ScriptedDetoxiGen(["Hello, dear reader."])
    assert model.generate("Hi").text == "Hello, dear reader."
    assert model.calls[0].prompt == "Hi"

A guard works as on the real one, but that nothing can be decoded again: a flagged sentence ends the reply at once.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from detox_guard.errors import DetoxGuardError, NotPicklableError, PromptTooLongError
from detox_guard.results import Chunk, Generation, Steering, Usage
from detox_guard.settings import DecodingParams
from detox_guard.text.prompts import ChatPrompt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from detox_guard.results import Intervention
    from detox_guard.text.prompts import Prompt

__all__ = ["Call", "Script", "ScriptedDetoxiGen", "ScriptedScorer"]

Script = Callable[[Any, DecodingParams], str | Exception] | Sequence[str | Exception]
"""Replies in turn (the last one for ever after), or a function of prompt and parameters. An exception is raised after
one word."""


class Call(NamedTuple):
    """What the model was asked. `how` is the name of the method."""

    how: str
    prompt: Any
    params: DecodingParams


class ScriptedScorer:
    """.9 for a text with one of the words in it, in any case, else .1. `seen` are all texts it was given."""

    def __init__(self, *words: str, name: str = "scripted") -> None:
        self.words = tuple(word.lower() for word in words)
        self.name = name
        self.seen: list[str] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        """One number a text."""
        self.seen += texts
        return [0.9 if any(word in text.lower() for word in self.words) else 0.1 for text in texts]


class ScriptedDetoxiGen:
    """A `DetoxiGen` without a model. A token is a word with the space behind it; ids are lengths of words.

    `interventions` are put into every reply's record, as if a guard had stepped in. `delay_s` is the time of a word.
    `active` requests are under way, `most_active` is the most there were, `abandoned` streams were not read to the end.
    """

    def __init__(
        self,
        script: Script = ("Hello, dear reader.",),
        *,
        params: DecodingParams | None = None,
        model_id: str = "scripted/words",
        chat: bool = True,
        tools: bool = True,
        context_window: int | None = 2048,
        delay_s: float = 0.0,
        interventions: Sequence[Intervention] = (),
    ) -> None:
        self.script = script
        self.params = params or DecodingParams()
        self.model_id = model_id
        self.detoxifier_ids = ("-1:0123456789ab",)
        self.streams: tuple[Any, ...] = self.detoxifier_ids
        """As many as it has detoxifiers; there is nothing in them."""
        self.has_chat_template, self.supports_tools = chat, tools
        self.context_window = context_window
        self.closed = False
        self.calls: list[Call] = []
        self.batch_sizes: list[int] = []
        self.active = self.most_active = self.abandoned = 0
        self._delay_s, self._interventions = delay_s, tuple(interventions)
        self._lock = threading.Lock()

    # -- the surface of DetoxiGen

    def generate(self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any) -> Generation:
        """The whole reply."""
        return _last(list(self._run(*self._plan("generate", prompt, params, changes))))

    def stream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> Generator[Chunk, None, None]:
        """The reply word by word. What is wrong with the prompt is raised here, as by the real one."""
        return self._run(*self._plan("stream", prompt, params, changes))

    def batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """All replies, in order."""
        self.batch_sizes.append(len(prompts))
        each = [params] * len(prompts) if params is None or isinstance(params, DecodingParams) else params
        results: list[Any] = []
        for prompt, own in zip(prompts, each, strict=True):
            try:
                results.append(_last(list(self._run(*self._plan("batch", prompt, own, {})))))
            except DetoxGuardError as error:
                if not return_exceptions:
                    raise
                results.append(error)
        return results

    async def agenerate(self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any) -> Generation:
        """The whole reply."""
        return _last([chunk async for chunk in self._arun("agenerate", prompt, params, changes)])

    async def astream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]:
        """The reply word by word."""
        async for chunk in self._arun("astream", prompt, params, changes):
            yield chunk

    async def abatch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """All replies, in order."""
        return await asyncio.to_thread(self.batch, prompts, params, return_exceptions=return_exceptions)

    def encode(self, text: str) -> list[int]:
        """An id a word: its length."""
        return [len(word) for word in text.split()]

    def count_tokens(self, prompt: Prompt) -> int:
        """Words of all messages."""
        return len(self.encode(_said(prompt)))

    def close(self) -> None:
        """From now on `closed`."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        raise NotPicklableError(f"the engine of {self.model_id!r} belongs to its process")

    # -- inside

    def _plan(
        self, how: str, prompt: Any, params: DecodingParams | None, changes: dict[str, Any]
    ) -> tuple[list[Chunk], Exception | None]:
        """The pieces of the reply and its end, or what is raised after the first piece."""
        own = self.params.guard
        params = self.params if params is None else params
        if own is not None and "guard" not in params.model_fields_set:
            params = params.replace(guard=own)
        params = params.replace(**changes)
        with self._lock:
            index = len(self.calls)
            self.calls.append(Call(how, prompt, params))
        read = self.count_tokens(prompt)
        if self.context_window is not None and read > self.context_window:
            raise PromptTooLongError("prompt", read, f"at most {self.context_window} tokens")
        said = self.script
        reply = said(prompt, params) if callable(said) else said[min(index, len(said) - 1)]
        if isinstance(reply, Exception):
            return [Chunk("One ")], reply
        for stop in params.stop:
            reply = reply.split(stop)[0]
        pieces = re.findall(r"\S+\s*|\s+", reply)
        cut = len(pieces) > params.max_new_tokens
        pieces = pieces[: params.max_new_tokens]
        taken = list(self._interventions)
        if params.guard is not None:
            from detox_guard.guard.stream import guard_text

            pieces, held = [], guard_text(pieces, params.guard, taken.append)
            for piece in held:
                over = len(taken) > len(self._interventions)
                pieces.append(piece.rstrip() if over else piece)
                if over:
                    break
        done = len(taken) > len(self._interventions)
        judge = None if params.guard is None else params.guard.scorer
        steering = Steering(params.alpha, params.rule, self.detoxifier_ids if params.alpha else (), 0.5, 0.25, 0, 0)
        whole = Generation(
            text="".join(pieces),
            finish_reason="guard" if done else "length" if cut else "stop",
            usage=Usage(read, len(pieces)),
            seed=params.seed or 0,
            trace=None,
            steering=steering,
            interventions=tuple(taken),
            guard=None if judge is None else str(getattr(judge, "name", judge)),
        )
        return [*map(Chunk, pieces), Chunk("", whole)], None

    def _seat(self, change: int, finished: bool = True) -> None:
        with self._lock:
            self.active += change
            self.most_active = max(self.most_active, self.active)
            self.abandoned += not finished

    def _run(self, chunks: Sequence[Chunk], error: Exception | None) -> Generator[Chunk, None, None]:
        finished = False
        self._seat(+1)
        try:
            for chunk in chunks:
                time.sleep(self._delay_s)
                yield chunk
            if error is not None:
                raise error
            finished = True
        finally:
            self._seat(-1, finished)

    async def _arun(
        self, how: str, prompt: Any, params: DecodingParams | None, changes: dict[str, Any]
    ) -> AsyncGenerator[Chunk, None]:
        finished = False
        self._seat(+1)
        try:
            chunks, error = self._plan(how, prompt, params, changes)
            for chunk in chunks:
                await asyncio.sleep(self._delay_s)
                yield chunk
            if error is not None:
                raise error
            finished = True
        finally:
            self._seat(-1, finished)


def _said(prompt: Any) -> str:
    messages = prompt.messages if isinstance(prompt, ChatPrompt) else prompt
    if isinstance(messages, str):
        return messages
    return " ".join(str(message.get("content") or "") for message in messages)


def _last(chunks: list[Chunk]) -> Generation:
    generation = chunks[-1].generation
    assert generation is not None, "a stream ends with its generation, or raises"
    return generation
