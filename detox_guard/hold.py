"""Guards a stream of text that another model writes: holds each unit until it is scored. Knows no engine, no tokens.

What cannot be decoded again can only be replaced, stopped or refused; the ladder has no part in this.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from detox_guard.audit import report
from detox_guard.errors import GuardError, ScorerError
from detox_guard.guard import closed_length
from detox_guard.judge import judge_for
from detox_guard.policy import GuardPolicy
from detox_guard.trace import Intervention
from detox_guard.units import in_code

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Iterator, Sequence

__all__ = ["aguard_text", "guard_text"]

_CHARS_PER_TOKEN = 4
"""A foreign stream has no tokens of ours; lengths in tokens are taken as so many times this many characters."""


def guard_text(
    chunks: Iterable[str], policy: GuardPolicy | None = None, on_event: Callable[[Intervention], object] | None = None
) -> Generator[str, None, None]:
    """The text of `chunks`, unit by unit as each is found fit; what is not is replaced, or ends the stream.

    "replace": the policy's `replacement` stands in the unit's place and the stream goes on; "stop": it ends before it;
    "raise": `GuardError`. Nothing unscored is ever yielded. `on_event` is called besides the policy's own.
    Raises `ScorerError` too, and what `chunks` raises.
    """
    held = _Held(policy or GuardPolicy(), on_event)
    for chunk in chunks:
        for unit in held.push(chunk):
            yield from held.judged(unit, held.score(held.texts(unit)))
            if held.stopped:
                return
    for unit in held.rest():
        yield from held.judged(unit, held.score(held.texts(unit)))


async def aguard_text(
    chunks: AsyncIterable[str],
    policy: GuardPolicy | None = None,
    on_event: Callable[[Intervention], object] | None = None,
) -> AsyncGenerator[str, None]:
    """`guard_text` without blocking the event loop."""
    held = _Held(policy or GuardPolicy(), on_event)
    async for chunk in chunks:
        for unit in held.push(chunk):
            for text in held.judged(unit, await held.ascore(held.texts(unit))):
                yield text
            if held.stopped:
                return
    for unit in held.rest():
        for text in held.judged(unit, await held.ascore(held.texts(unit))):
            yield text


class _Held:
    """Text that came but was not judged yet, and what was let through before it."""

    def __init__(self, policy: GuardPolicy, on_event: Callable[[Intervention], object] | None) -> None:
        self.policy = policy
        self.on_event = on_event
        self.judge = judge_for(policy.scorer)
        self.stopped = False
        self._text = ""
        self._released = ""
        self._code = False
        self._units = 0

    def push(self, chunk: str) -> Iterator[str]:
        """Units that are whole now."""
        self._text += chunk
        while end := closed_length(self._text, self.policy, self._code, len(self._text) // _CHARS_PER_TOKEN):
            unit, self._text = self._text[:end], self._text[end:]
            self._code = in_code(unit, self._code)
            yield unit

    def rest(self) -> Iterator[str]:
        """The last unit, which nothing ended."""
        if self._text:
            yield self._text

    def texts(self, unit: str) -> list[str]:
        before = self._released[-self.policy.context_chars :] if self.policy.context_chars else ""
        return [unit, before + unit] if before else [unit]

    def score(self, texts: Sequence[str]) -> float:
        try:
            return max(self.judge.submit(texts).result(self.policy.scorer_timeout_s))
        except TimeoutError:
            raise self._late() from None

    async def ascore(self, texts: Sequence[str]) -> float:
        scores = asyncio.wrap_future(self.judge.submit(texts))
        try:
            return max(await asyncio.wait_for(scores, self.policy.scorer_timeout_s))
        except TimeoutError:
            raise self._late() from None

    def judged(self, unit: str, score: float) -> Iterator[str]:
        """What goes out for this unit. Raises `GuardError`."""
        policy, index = self.policy, self._units
        self._units += 1
        if score <= policy.threshold:
            self._released = self._released[-policy.context_chars :] + unit
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
        report(policy, event, None)
        if self.on_event is not None:
            self.on_event(event)
        if policy.on_exhausted == "raise":
            raise GuardError(f"unit {index} scored {score:.2f}, over {policy.threshold:g}")
        self.stopped = policy.on_exhausted == "stop"
        if not self.stopped:
            yield policy.replacement + unit[len(unit.rstrip()) :]

    def _late(self) -> ScorerError:
        return ScorerError(
            f"scorer {self.judge.scorer.name!r} gave no answer in {self.policy.scorer_timeout_s:g} s",
            hint="raise GuardPolicy.scorer_timeout_s",
        )
