"""The seam to an execution backend: what the scheduler asks of it. Knows rows as handles; knows no keys, no values.

A runner holds one batch of *rows*. A row is one view of one request: the generator's, or that of a detoxifier. Each
step feeds one token to every row, or a few. What a prompt or a row holds can be put aside as a *saved* handle and
joined again.

To write a runner is to write the two classes below, `Prefill` and `Runner`; nothing else in the engine changes. Any
thread may call `slots` and `room`; one thread calls all else, the engine's, in `torch.inference_mode`. An error that is
raised in `decode`, `join`, `leave` or `rewind` costs everybody in the batch, and `clear` follows; one of a prefill
costs the requests of that prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from detox_guard.engine.base import PromptIds, ViewKind

__all__ = ["Base", "Computed", "Prefill", "Room", "Row", "Runner", "RunnerLimits", "Saved", "rows_for"]


@dataclass(frozen=True)
class RunnerLimits:
    """What a runner is able to do; requests that need more are refused by name."""

    vocab_size: int
    max_positions: int | None
    """Positions a row may have. None is no bound."""
    views: frozenset[ViewKind]
    """The kinds of view that it can give a row."""
    rewinds: bool = True
    """Whether a row can be rewound. One that cannot serves no guard."""
    continues: bool = False
    """Whether a prompt can be begun with part of what another one's rows hold. One that cannot gets no bases."""
    at_once: int = 0
    """How many tokens, of all rows together, a step takes at little more than the cost of one a row. One that has 0 is
    only ever given one token a row, and so no drafts."""


def rows_for(prompt: PromptIds, runner: Runner) -> int:
    """The rows that a request takes."""
    return 1 + len(runner.weights) if prompt.steered else 1


@dataclass(eq=False)
class Row:
    """A handle on a row of the running batch. The runner that made it keeps it up to date."""

    index: int
    """Its place among the rows: rows are numbered from 0 without a gap. So also the row of the logits that is its."""
    length: int
    """The slots that it holds, so also its next position."""


class Room(NamedTuple):
    """The memory that a request takes, at the most."""

    lanes: int
    """Stretches of memory: one a row, or one for several rows that share a context."""
    slots: int
    """Of the longest of them."""


class Saved(Protocol):
    """A handle on what a row held. Its memory is in use as long as somebody holds the handle."""

    @property
    def slots(self) -> int:
        """The slots that it holds itself. What a row shares with another one may be held there only."""


class Computed(NamedTuple):
    """A prompt that was computed: the generator's part first, then one a view."""

    logits: Tensor
    """`[rows, vocab]` float32: for the first token of the reply."""
    rows: Sequence[Saved]


class Base(NamedTuple):
    """Another prompt, which begins like the one to compute, and what became of it."""

    prompt: PromptIds
    rows: Sequence[Saved]
    """As in `Computed`. They stay good."""


class Prefill(Protocol):
    """Prompts on their way into rows, `advance` by `advance`. One that is not finished is dropped by forgetting it."""

    @property
    def rows(self) -> int:
        """How many rows are computed at once: what one column costs."""

    @property
    def left(self) -> int:
        """Columns that are still to compute."""

    def advance(self, columns: int, given_up: Callable[[], bool]) -> bool:
        """Compute up to so many columns more; True when none is left.

        `given_up` may be asked in between, from this thread. True says that nobody wants the prompts any more: a runner
        that can break off does, and returns False.
        """

    def finish(self) -> list[Computed]:
        """What became of each prompt, in the order they were begun. After that this object is of no use."""


class Runner(Protocol):
    """One model, its views, and one running batch."""

    @property
    def limits(self) -> RunnerLimits: ...

    @property
    def weights(self) -> Sequence[float]:
        """The signed weights of its views, in the order of a request's rows."""

    @property
    def device(self) -> torch.device:
        """Where its logits are."""

    @property
    def rows(self) -> int:
        """Rows in the batch."""

    def slots(self, prompt: PromptIds) -> int:
        """The most slots that a row of such a prompt holds before its reply."""

    def room(self, prompt: PromptIds, max_new_tokens: int) -> Room:
        """The memory that a request takes with such a prompt and a reply of so many tokens."""

    def begin(self, prompts: Sequence[PromptIds], bases: Sequence[Base | None] = ()) -> Prefill:
        """Start to compute prompts beside the batch, together. Several fit one chunk; a single one may be longer.

        `bases`, if there are any, is one a prompt. What the beginnings have in common, row by row, need not be computed
        again; how much of it a runner takes is its own affair. The last token is always computed: it gives the logits.
        """

    def join(self, saved: Sequence[Saved], new: int) -> list[Row]:
        """New rows that hold what was saved, in that order: all rows of one request. The handles stay good.

        `new`: the tokens of its reply at the most, also where it has some already, as in `room`.
        """

    def save(self, rows: Sequence[Row]) -> Sequence[Saved]:
        """What `join` takes to bring all rows of one request back, whatever becomes of them; they can then be rewound
        as far as now."""

    def leave(self, row: Row) -> None:
        """Drop a row. The last row takes its index."""

    def rewind(self, row: Row, slots: int) -> None:
        """Drop the last `slots` of a row (0 to its length - 1), as if they had never been."""

    def decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed `tokens[i]`, in order, to the row of index i, for every row; all get as many, at least one. Logits
        behind each of them, `[rows, tokens of a row, vocab]` float32, the caller's to overwrite. Every row is so many
        slots longer afterwards."""

    def clear(self) -> None:
        """Drop all rows, also after an error that left them in disorder."""

    def close(self) -> None:
        """Give everything back. Nothing is asked of it after that."""
