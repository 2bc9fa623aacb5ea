"""A runner that is watched: what it is asked is noted, and a test may break in by setting a hook."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from detox_guard.engine.runner import Computed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.engine import PromptIds
    from detox_guard.engine.runner import Base, Row, Saved


def nothing(*_: Any) -> None:
    """The hook that does nothing."""


class Watched:
    """Asks `runner`. A hook that raises is a runner that fails."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.begun: list[list[PromptIds]] = []
        self.columns: list[int] = []
        """How many each of them had to compute."""
        self.saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        """What was saved and is still held."""
        self.given_up = False
        """Whether nobody wanted some prompt any more, when it was asked."""
        self.before_advance: Any = nothing
        """`(prompts, columns)`"""
        self.before_join: Any = nothing
        """`(saved)`"""
        self.spoil: Any = nothing
        """`(logits)` behind the first tokens of a step, to change in place."""
        self.fed: list[tuple[int, int]] = []
        """Of each step the rows, and how many tokens each of them got."""
        self.loses_views = False
        """Give nothing but the generator's row."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    @property
    def held_slots(self) -> int:
        return sum(saved.slots for saved in self.saved)

    def begin(self, prompts: Sequence[PromptIds], bases: Sequence[Base | None] = ()) -> Any:
        self.begun.append(list(prompts))
        return _WatchedPrefill(self, list(prompts), bases)

    def join(self, saved: Sequence[Saved], new: int) -> list[Row]:
        for one in saved:
            self.before_join(one)
        rows: list[Row] = self.runner.join(saved, new)
        return rows

    def decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        self.fed.append((len(tokens), len(tokens[0])))
        logits: Tensor = self.runner.decode(tokens)
        self.spoil(logits[:, 0])
        return logits


class _WatchedPrefill:
    def __init__(self, watched: Watched, prompts: list[PromptIds], bases: Sequence[Base | None]) -> None:
        self._watched, self._prompts = watched, prompts
        self._prefill = watched.runner.begin(prompts, bases)
        watched.columns.append(self._prefill.left)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prefill, name)

    def advance(self, columns: int, given_up: Any) -> bool:
        self._watched.before_advance(self._prompts, columns)
        self._watched.given_up |= given_up()
        done: bool = self._prefill.advance(columns, given_up)
        return done

    def finish(self) -> list[Computed]:
        out: list[Computed] = self._prefill.finish()
        if self._watched.loses_views:
            out = [Computed(computed.logits[:1], computed.rows[:1]) for computed in out]
        for computed in out:
            self._watched.saved.update(computed.rows)
        return out
