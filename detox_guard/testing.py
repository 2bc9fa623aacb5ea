"""For tests of programs that use detox-guard: a scripted model and a scripted scorer. Knows no weights, no tokenizer.

`ScriptedDetoxiGen` has the surface of `DetoxiGen`, so it goes wherever one goes: `ChatDetoxiGen(detoxigen=…)` in
LangChain, `DetoxiGenLLM(detoxigen=…)` in LlamaIndex. It says what it is told to and keeps what it was asked::

    from detox_guard.testing import ScriptedDetoxiGen

    model = ScriptedDetoxiGen(["Hello, dear reader."])
    assert model.generate("Hi").text == "Hello, dear reader."
    assert model.calls[0].prompt == "Hi"

A guard works as on the real one, but nothing can be decoded again: a flagged sentence ends the reply. No time passes by
itself. `hold` keeps requests waiting, and `wait_for` tells when so many are under way::

    with model.hold():
        task = asyncio.create_task(model.agenerate("Hi"))
        await asyncio.to_thread(model.wait_for, 1)
        task.cancel()
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from detox_guard.errors import DetoxGuardError, NotPicklableError, PromptTooLongError
from detox_guard.results import Chunk, Generation, Steering, Usage
from detox_guard.settings import DecodingParams
from detox_guard.text.prompts import ChatPrompt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator

    from detox_guard.results import Intervention
    from detox_guard.settings import GuardPolicy
    from detox_guard.text.prompts import Prompt

    OnChunk = Callable[[int, Chunk], object]

__all__ = ["Call", "Said", "Script", "ScriptedDetoxiGen", "ScriptedScorer", "tool_call"]


@dataclass(frozen=True)
class Said:
    """One reply: its text, and how it ends."""

    text: str
    finish_reason: Literal["stop", "length", "guard"] | None = None
    """None is what the parameters make of the text: "stop", or "length" where it has too many words."""
    error: Exception | None = None
    """Raised after the text, in place of an end."""


Script = Callable[[Any, DecodingParams], str | Exception | Said] | Sequence[str | Exception | Said]
"""Replies in turn (the last one for ever after), or a function of prompt and parameters. An exception by itself is
raised after one word."""
_Step = Chunk | Exception


class Call(NamedTuple):
    """What the model was asked. `how` is the name of the method."""

    how: str
    prompt: Any
    params: DecodingParams


def tool_call(name: str, /, **arguments: Any) -> str:
    """A call of a tool as many models write it: text for a script."""
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


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

    `together`: nobody gets a word before so many requests were under way at once. `interventions` are put into every
    reply's record, as if a guard had stepped in.
    `active` requests are under way, `most_active` is the most there were, `abandoned` ones did not come to their end.
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
        together: int = 1,
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
        self._interventions = tuple(interventions)
        self._changed = threading.Condition()
        self._together, self._held = together, together > 1
        self._turns: list[Future[None]] = []
        """Words that wait to be said."""

    # -- the surface of DetoxiGen

    def generate(self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any) -> Generation:
        """The whole reply."""
        return _last(list(self._run(self._plan("generate", prompt, params, changes))))

    def stream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> Generator[Chunk, None, None]:
        """The reply word by word. What is wrong with the prompt is raised here, as by the real one."""
        return self._run(self._plan("stream", prompt, params, changes))

    def batch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """All replies, in order. All are under way from the start."""
        self.batch_sizes.append(len(prompts))
        results: list[Any] = []
        with ExitStack() as seats:
            for _ in prompts:
                seats.enter_context(self._seat())
            for prompt, own in _each(prompts, params):
                try:
                    results.append(_last(list(self._words(self._plan("batch", prompt, own, {})))))
                except DetoxGuardError as error:
                    if not return_exceptions:
                        raise
                    results.append(error)
        return results

    async def agenerate(self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any) -> Generation:
        """The whole reply."""
        return _last([chunk async for chunk in self._arun(self._plan("agenerate", prompt, params, changes))])

    async def astream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]:
        """The reply word by word."""
        async for chunk in self._arun(self._plan("astream", prompt, params, changes)):
            yield chunk

    async def abatch(
        self,
        prompts: Sequence[Prompt],
        params: DecodingParams | Sequence[DecodingParams] | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """All replies, in order."""
        self.batch_sizes.append(len(prompts))

        async def one(prompt: Prompt, own: DecodingParams | None) -> Any:
            try:
                return _last([chunk async for chunk in self._arun(self._plan("abatch", prompt, own, {}))])
            except DetoxGuardError as error:
                if not return_exceptions:
                    raise
                return error

        return await asyncio.gather(*(one(*asked) for asked in _each(prompts, params)))

    def as_completed(
        self, prompts: Sequence[Prompt], params: Any = None, *, on_chunk: OnChunk | None = None, **how: Any
    ) -> Generator[tuple[int, Any], None, None]:
        """All replies of `batch`, each with its index; here in the order of the prompts."""
        return _one_by_one(self.batch(prompts, params, **how), on_chunk)

    async def aas_completed(
        self, prompts: Sequence[Prompt], params: Any = None, *, on_chunk: OnChunk | None = None, **how: Any
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """All replies of `abatch`, each with its index."""
        for one in _one_by_one(await self.abatch(prompts, params, **how), on_chunk):
            yield one

    def encode(self, text: str) -> list[int]:
        """An id a word: its length."""
        return [len(word) for word in text.split()]

    def count_tokens(self, prompt: Prompt) -> int:
        """Words of all messages, and of the tools that are shown."""
        return len(self.encode(_read(prompt)))

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

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside the block no request gets a further word. Cancelling one still works."""
        self._held = True
        try:
            yield
        finally:
            self._release()

    def wait_for(self, active: int, *, timeout_s: float = 30.0) -> None:
        """Until so many requests are under way: `await asyncio.to_thread(model.wait_for, 2)`. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.active == active, timeout_s):
                raise TimeoutError(f"{self.active} requests are under way, not {active}")

    def _release(self) -> None:
        with self._changed:
            self._held = False
            turns, self._turns = self._turns, []
        for turn in turns:
            if turn.set_running_or_notify_cancel():
                turn.set_result(None)

    def _turn(self) -> Future[None]:
        """Done as soon as the next word may be said."""
        turn: Future[None] = Future()
        with self._changed:
            if self._held:
                self._turns.append(turn)
                return turn
        turn.set_result(None)
        return turn

    @contextmanager
    def _seat(self) -> Iterator[None]:
        """A request under way."""
        with self._changed:
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            enough = self._together > 1 and self.active >= self._together
            if enough:
                self._together = 1
            self._changed.notify_all()
        if enough:
            self._release()
        finished = False
        try:
            yield
            finished = True
        finally:
            with self._changed:
                self.active -= 1
                self.abandoned += not finished
                self._changed.notify_all()

    # -- what it says

    def _plan(self, how: str, prompt: Any, params: DecodingParams | None, changes: dict[str, Any]) -> list[_Step]:
        """The reply in pieces, and its end."""
        own = self.params.guard
        params = self.params if params is None else params
        if own is not None and "guard" not in params.model_fields_set:
            params = params.replace(guard=own)
        params = params.replace(**changes)
        with self._changed:
            index = len(self.calls)
            self.calls.append(Call(how, prompt, params))
        read = self.count_tokens(prompt)
        if self.context_window is not None and read > self.context_window:
            raise PromptTooLongError("prompt", read, f"at most {self.context_window} tokens")
        told = self.script
        said = told(prompt, params) if callable(told) else told[min(index, len(told) - 1)]
        if isinstance(said, Exception):
            said = Said("One ", error=said)
        elif isinstance(said, str):
            said = Said(said)
        return self._steps(said, read, params)

    def _steps(self, said: Said, read: int, params: DecodingParams) -> list[_Step]:
        text = said.text
        for stop in params.stop:
            text = text.split(stop)[0]
        pieces = re.findall(r"\S+\s*|\s+", text)
        cut = len(pieces) > params.max_new_tokens
        pieces = pieces[: params.max_new_tokens]
        taken: list[Intervention] = []
        if params.guard is not None:
            pieces, taken = _guarded(pieces, params.guard)
        if said.error is not None and not taken:
            return [*map(Chunk, pieces), said.error]
        interventions = (*self._interventions, *taken)
        judge = None if params.guard is None else params.guard.scorer
        whole = Generation(
            text="".join(pieces),
            finish_reason="guard" if taken else said.finish_reason or ("length" if cut else "stop"),
            usage=Usage(read, len(pieces), sum(one.tokens for one in interventions)),
            seed=params.seed or 0,
            trace=None,
            steering=Steering(params.alpha, params.rule, self.detoxifier_ids if params.alpha else (), 0.5, 0.25, 0, 0),
            interventions=interventions,
            guard=None if judge is None else str(getattr(judge, "name", judge)),
        )
        return [*map(Chunk, pieces), Chunk("", whole)]

    def _words(self, steps: Sequence[_Step]) -> Generator[Chunk, None, None]:
        for step in steps:
            turn = self._turn()
            while not wait([turn], timeout=0.1).done:  # in slices: Ctrl-C may come right before a wait
                pass
            yield _chunk(step)

    def _run(self, steps: Sequence[_Step]) -> Generator[Chunk, None, None]:
        with self._seat():
            yield from self._words(steps)

    async def _arun(self, steps: Sequence[_Step]) -> AsyncGenerator[Chunk, None]:
        with self._seat():
            for step in steps:
                await asyncio.wrap_future(self._turn())
                yield _chunk(step)


def _guarded(pieces: list[str], policy: GuardPolicy) -> tuple[list[str], list[Intervention]]:
    """What a guard lets through, up to the first sentence that it does not; and what it did about that one."""
    from detox_guard.guard.stream import guard_text  # which loads torch

    taken: list[Intervention] = []
    passed: list[str] = []
    for piece in guard_text(pieces, policy, taken.append):
        passed.append(piece.rstrip() if taken else piece)
        if taken:
            break
    return passed, taken


def _each(prompts: Sequence[Any], params: Any) -> list[tuple[Any, DecodingParams | None]]:
    own = [params] * len(prompts) if params is None or isinstance(params, DecodingParams) else params
    return list(zip(prompts, own, strict=True))


def _chunk(step: _Step) -> Chunk:
    if isinstance(step, Exception):
        raise step
    return step


def _read(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    messages, tools = (prompt.messages, prompt.tools) if isinstance(prompt, ChatPrompt) else (prompt, ())
    said = [str(message.get("content") or "") for message in messages]
    return " ".join([*said, *map(json.dumps, tools)])


def _one_by_one(replies: list[Any], on_chunk: OnChunk | None) -> Generator[tuple[int, Any], None, None]:
    for index, reply in enumerate(replies):
        if on_chunk is not None and isinstance(reply, Generation):
            on_chunk(index, Chunk(reply.text, reply))
        yield index, reply


def _last(chunks: list[Chunk]) -> Generation:
    generation = chunks[-1].generation
    assert generation is not None, "a stream ends with its generation, or raises"
    return generation
