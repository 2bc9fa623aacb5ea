"""The seam to an engine: what is asked of one, and what passes between it and who asks. Knows ids; knows no text, no
rows.

A request is frozen. While it is decoded its sink answers each token with a verdict, and that is the only way to change
how the next one is chosen. So an engine may live in another thread, library or process.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from detox_guard.results import Finish
from detox_guard.steering.choose import TokenStep
from detox_guard.steering.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = [
    "Bounds",
    "End",
    "Engine",
    "EngineLimits",
    "EngineStats",
    "Finish",
    "Go",
    "PromptIds",
    "Request",
    "Rewind",
    "Sampling",
    "Sink",
    "TokenConstraint",
    "TokenStep",
    "Verdict",
    "ViewKind",
]

ViewKind = Literal["embeddings", "tokens"]
"""What a view adds to the context: virtual tokens, or ids of the model's own vocabulary."""


class PromptIds(NamedTuple):
    """All that the rows of a request hold before its reply; equal ones are computed once."""

    ids: tuple[int, ...]
    steered: bool
    """Whether it takes a row of every view, besides the generator's."""
    contexts: tuple[tuple[int, ...], ...] = ()
    """What each view of place "system" reads in the place of `ids`, in the order of the views; none if not steered."""

    @property
    def longest(self) -> int:
        """Columns to compute: of its longest context."""
        return max(map(len, (self.ids, *self.contexts)))

    def slots(self, beside: int) -> int:
        """The most that one of its rows holds, where views take at the most so many `beside` the context."""
        return max(len(self.ids) + (beside if self.steered else 0), *map(len, self.contexts), 0)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two prompts have in common before the first that differs. Both are of one type."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])


@dataclass(frozen=True, slots=True)
class Go:
    """A verdict: the next token, by this `sampling` (None is the request's own) and without the `banned` ids.

    A verdict says it all: what the one before it said does not hold any more. It may change alpha (not above 0 where
    the request is not steered), rule, temperature and nucleus; the repetition penalty stays the request's.
    """

    sampling: Sampling | None = None
    banned: frozenset[int] = frozenset()
    """Ids that may not come next, unless the constraint leaves no other."""


@dataclass(frozen=True, slots=True)
class Rewind:
    """A verdict: take back the last `tokens` emitted tokens, then as `Go`."""

    tokens: int
    sampling: Sampling | None = None
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class End:
    """A verdict: the reply is over, for this reason."""

    reason: Finish


Verdict = Go | Rewind | End


class Sink(Protocol):
    """Receives one request's tokens, on the engine's thread: be quick, do not block. An exception fails the request."""

    def on_token(self, step: TokenStep) -> Verdict:
        """One token, which counts as emitted."""

    def on_end(self, reason: Finish) -> End | Rewind | None:
        """The model is done. `End` closes the reply (also for another reason), a `Rewind` goes on decoding; None says
        not yet: the rows leave the batch, and the question is put again until it is answered."""

    def on_finish(self, reason: Finish) -> None:
        """The reply is complete."""

    def on_error(self, error: Exception) -> None:
        """The request failed or was cancelled; no other call follows."""


class TokenConstraint(Protocol):
    """What one reply may be. Stateful, so of one request alone; the engine's thread calls it."""

    def allowed(self) -> Tensor | None:
        """`[vocab]` bool on the CPU: what may come next, end tokens included; None = anything. Must not raise: all
        False fails the request."""

    def accept(self, token_id: int) -> bool:
        """A token was emitted. True if the reply is whole and nothing may follow. An exception fails the request."""

    def rollback(self, tokens: int) -> None:
        """The last `tokens` emitted tokens were taken back."""


@dataclass(frozen=True, eq=False)
class Request:
    """One reply to decode."""

    prompt: PromptIds
    sampling: Sampling
    max_new_tokens: int
    seed: int
    """From 0 to 2**63 - 1; already drawn."""
    end_ids: frozenset[int]
    """The ids that end the reply. They are not emitted."""
    sink: Sink
    constraint: TokenConstraint | None = None
    may_rewind: bool = False
    """Whether its sink may answer with `Rewind`."""
    keep_distributions: bool = False
    """Whether its steps carry the whole distribution that each token was drawn from."""
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)

    def cancel(self) -> None:
        """Ask the engine to drop this request; its seat is free within one step. Safe from any thread, any time."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass
class EngineStats:
    """Counters since the engine started, and what it holds now. Steered means alpha > 0."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens_steered: int = 0
    """Tokens emitted for steered requests; always equal to `steps_steered`."""
    steps_steered: int = 0
    """Contrasts computed from a whole set of rows and then emitted."""
    tokens_plain: int = 0
    tokens_rewound: int = 0
    tokens_drafted: int = 0
    """Tokens that were fed before they were chosen,"""
    tokens_accepted: int = 0
    """and how many of them were chosen then."""
    fallbacks: int = 0
    seats: int = 0
    rows: int = 0
    queued: int = 0
    waiting: int = 0
    """Who waits for a place in the queue."""


@dataclass(frozen=True)
class EngineLimits:
    """What an engine serves. What is beyond it is refused by name."""

    max_positions: int | None
    """What prompt, virtual tokens and new tokens may come to together; None is no bound."""
    max_rows: int
    """Rows in the running batch."""
    views: frozenset[ViewKind]
    rewinds: bool
    """Whether tokens can be taken back, as a guard needs."""


class Bounds(Protocol):
    """What an engine is held to: `settings.EngineConfig`, which says what each of them means."""

    @property
    def max_rows(self) -> int: ...
    @property
    def max_queue(self) -> int: ...
    @property
    def when_full(self) -> Literal["wait", "refuse"]: ...
    @property
    def max_slots(self) -> int | None: ...
    @property
    def max_cached_slots(self) -> int: ...
    @property
    def prefill_chunk(self) -> int: ...
    @property
    def prompt_cache_slots(self) -> int: ...
    @property
    def pack_weights(self) -> bool: ...
    @property
    def drafts(self) -> int: ...
    @property
    def cuda_graphs(self) -> bool: ...


class Engine(Protocol):
    """Decodes many requests at once. Thread-safe.

    The queue has a bounded number of places. Who asks takes one first, so that nothing is prepared for a queue that is
    full; `submit` uses it up.
    """

    @property
    def limits(self) -> EngineLimits: ...

    def check(self, prompt: PromptIds, max_new_tokens: int, may_rewind: bool = False) -> None:
        """Raise what `submit` would raise for such a request: `PromptError`, `EngineError`."""

    def submit(self, request: Request, *, placed: bool = False) -> None:
        """Queue a request; its sink hears the rest. `placed`: a place of the queue was taken for it, which goes with
        it, or is free again where this raises. Raises `PromptError` and `EngineError`, as `EngineBusyError` and
        `EngineClosedError`.
        """

    def take_place(self, check: Callable[[], None] | None = None) -> None:
        """Take a place of the queue, for `submit`; wait for one where it is full and the configuration says so.

        `check` is called now and then while this waits, and may raise. Raises `EngineBusyError`, `EngineClosedError`.
        """

    async def take_place_async(self) -> None:
        """`take_place` for a task, which may be cancelled."""

    def give_back(self) -> None:
        """A place that was taken is not needed."""

    def check_open(self) -> None:
        """Raise `EngineClosedError` on an engine that answers nobody any more; where full queues refuse,
        `EngineBusyError` for a full one."""

    def check_alive(self) -> None:
        """Raise `EngineClosedError` if nobody is there any more who could answer what was submitted."""

    def stats(self) -> EngineStats:
        """A copy of the counters."""

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the engine itself, in a hook or a sink: waiting for a reply it would wait for ever."""

    @property
    def closed(self) -> bool: ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop; requests still under way fail with `EngineClosedError`. Idempotent."""
