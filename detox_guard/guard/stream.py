"""Guards a stream of text that another model writes: holds each unit until it is scored. Knows no engine, no tokens.

What cannot be decoded again can only be replaced, stopped or refused; the ladder has no part in this.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterable, Mapping
from typing import TYPE_CHECKING

from detox_guard._threads import run_off_loop
from detox_guard.errors import GuardError, InvalidParamsError
from detox_guard.guard.audit import call_hook, check_log, report_intervention
from detox_guard.guard.reply import closed_length, late
from detox_guard.guard.units import Reading
from detox_guard.results import Chunk, Intervention
from detox_guard.scorers.batcher import batcher_for
from detox_guard.settings import GuardPolicy
from detox_guard.text.sentences import in_code

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterator

    from detox_guard.guard.units import Asked
    from detox_guard.scorers.batcher import Batcher

__all__ = ["aguard_text", "guard_text"]

_CHARS_PER_TOKEN = 4
"""A foreign stream has no tokens of ours; lengths in tokens are taken as so many times this many characters."""


def guard_text(
    chunks: Iterable[str | Chunk | None],
    policy: GuardPolicy | None = None,
    on_event: Callable[[Intervention], object] | None = None,
) -> Generator[str, None, None]:
    """The text of `chunks`, unit by unit as each is found fit; what is not is replaced, or ends the stream.

    "replace": the policy's `replacement` stands in the unit's place and the stream goes on; "stop": it ends before it;
    "raise": `GuardError`. Nothing unscored is ever yielded. A chunk is a string, None (as a stream's last may be), or a
    `Chunk` of ours. `on_event` is called besides the policy's own, and like that one may fail without harm.
    Raises at once `InvalidParamsError` (`chunks`, `policy`, a log that cannot be written) and `ScorerError` (no such
    scorer); while it is read, both again (`chunks[i]` that is no text) and what `chunks` raises.
    """
    if not isinstance(chunks, Iterable) or isinstance(chunks, Mapping | bytes):
        raise InvalidParamsError("chunks", chunks, "something to iterate over", hint=_other(chunks))
    held = _Held(_checked(policy), on_event)
    held.load()
    return _guarded(chunks, held)


def _guarded(chunks: Iterable[str | Chunk | None], held: _Held) -> Generator[str, None, None]:
    for chunk in chunks:
        for unit in held.push(chunk):
            yield from held.released(unit, held.score(unit))
            if held.stopped:
                return
    for unit in held.rest():
        yield from held.released(unit, held.score(unit))


def aguard_text(
    chunks: AsyncIterable[str | Chunk | None],
    policy: GuardPolicy | None = None,
    on_event: Callable[[Intervention], object] | None = None,
) -> AsyncGenerator[str, None]:
    """`guard_text` without blocking the event loop; a scorer that has to be loaded is loaded when the first text is
    asked for."""
    if not isinstance(chunks, AsyncIterable):
        raise InvalidParamsError("chunks", chunks, "something to iterate over with `async for`", hint=_other(chunks))
    return _aguarded(chunks, _Held(_checked(policy), on_event))


async def _aguarded(chunks: AsyncIterable[str | Chunk | None], held: _Held) -> AsyncGenerator[str, None]:
    await run_off_loop(held.load)
    async for chunk in chunks:
        for unit in held.push(chunk):
            for text in held.released(unit, await held.ascore(unit)):
                yield text
            if held.stopped:
                return
    for unit in held.rest():
        for text in held.released(unit, await held.ascore(unit)):
            yield text


def _checked(policy: GuardPolicy | None) -> GuardPolicy:
    if policy is not None and not isinstance(policy, GuardPolicy):
        raise InvalidParamsError("policy", policy, "a GuardPolicy or None")
    return policy or GuardPolicy()


def _other(chunks: object) -> str:
    if isinstance(chunks, AsyncIterable):
        return "aguard_text reads an async stream"
    return "guard_text reads a plain stream" if isinstance(chunks, Iterable) else ""


class _Held:
    """Text that came but was not scored yet, and what was let through before it. `load` before the first score."""

    batcher: Batcher

    def __init__(self, policy: GuardPolicy, on_event: Callable[[Intervention], object] | None) -> None:
        if policy.audit_log is not None:
            check_log(policy.audit_log)
        self.policy = policy
        self.on_event = on_event
        self.stopped = False
        self._text = ""
        self._reading = Reading(policy.context_chars)
        self._after = self._reading
        self._final = False
        self._code = False
        self._chunks = 0
        self._units = 0

    def load(self) -> None:
        """Raises `ScorerError`."""
        self.batcher = batcher_for(self.policy.scorer)

    def push(self, chunk: object) -> Iterator[str]:
        """Units that are whole now. Raises `InvalidParamsError`."""
        if isinstance(chunk, Chunk):
            chunk = chunk.text
        if chunk is not None and not isinstance(chunk, str):
            raise InvalidParamsError(
                f"chunks[{self._chunks}]", chunk, "a string or None", hint="pass the text of each chunk"
            )
        self._chunks += 1
        self._text += chunk or ""
        while end := self._closed_length():
            unit, self._text = self._text[:end], self._text[end:]
            self._code = in_code(unit, self._code)
            yield unit

    def _closed_length(self) -> int:
        """As if the text came a token at a time, however long its chunks are."""
        longest = self.policy.max_unit_tokens if self.policy.unit == "sentence" else self.policy.unit
        for tokens in range(longest, 2 * longest + 1):
            text = self._text[: tokens * _CHARS_PER_TOKEN]
            end = closed_length(text, self.policy, self._code, len(text) // _CHARS_PER_TOKEN)
            if end or len(text) == len(self._text):
                return end
        return 0

    def rest(self) -> Iterator[str]:
        """The last unit, which nothing ended."""
        self._final = True
        if self._text:
            yield self._text

    def score(self, unit: str) -> float:
        """Raises `ScorerError`."""
        asked = self._asked(unit)
        scores = self.batcher.submit(asked.texts)
        try:
            return asked.worst(scores.result(self.policy.scorer_timeout_s), self.policy.threshold)
        except TimeoutError:
            raise late(self.batcher, self.policy) from None
        finally:
            scores.cancel()

    async def ascore(self, unit: str) -> float:
        """Raises `ScorerError`."""
        asked = self._asked(unit)
        scores = asyncio.wrap_future(self.batcher.submit(asked.texts))
        try:
            found = await asyncio.wait_for(scores, self.policy.scorer_timeout_s)
            return asked.worst(found, self.policy.threshold)
        except TimeoutError:
            raise late(self.batcher, self.policy) from None

    def _asked(self, unit: str) -> Asked:
        asked, self._after = self._reading.read(unit, final=self._final)
        return asked

    def released(self, unit: str, score: float) -> Iterator[str]:
        """What goes out for this unit. Raises `GuardError`."""
        policy, index = self.policy, self._units
        self._units += 1
        if score <= policy.threshold:
            self._reading = self._after
            yield unit
            return
        event = Intervention(
            unit=index,
            start=0,
            tokens=0,
            score=score,
            threshold=policy.threshold,
            alpha=0.0,
            next_alpha=None,
            action=policy.on_exhausted,
            text=unit if policy.keep_discarded else None,
        )
        report_intervention(policy, event, None)
        if self.on_event is not None:
            call_hook(self.on_event, event)
        if policy.on_exhausted == "raise":
            raise GuardError(f"unit {index} scored {score:.2f}, over {policy.threshold:g}")
        self.stopped = policy.on_exhausted == "stop"
        if not self.stopped:
            instead = policy.replacement + unit[len(unit.rstrip()) :]
            self._reading = self._reading.skip(unit, instead)
            yield instead
