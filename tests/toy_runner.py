"""A runner without a model: the next token's logits are noise, seeded by all that a row has read.

So a row that read one token too many, too few, or another's shows at once. It is all that a backend must write to be
served by the engine, and the least: `detox_guard.engine.runner` says what each method owes.
"""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from detox_guard.detoxifiers.base import ids_behind, most_beside, own_contexts
from detox_guard.engine.base import shared
from detox_guard.engine.runner import Computed, Room, Row, RunnerLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from detox_guard.detoxifiers.base import TokenPrefix
    from detox_guard.engine import PromptIds
    from detox_guard.engine.runner import Base

VOCAB, POSITIONS = 480, 512


def rows_of(views: Sequence[TokenPrefix], ids: Sequence[int], contexts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What each row of a steered request reads before the reply: the generator's, then one a view."""
    own = own_contexts(views, contexts)
    rows = [list(ids)]
    for index, view in enumerate(views):
        if view.place == "system":
            rows.append(list(own[index]))
        else:
            rows.append([*view.ids, *ids] if view.place == "front" else [*ids, *ids_behind(view, ids)])
    return rows


def toy_logits(read: Sequence[int]) -> torch.Tensor:
    """`[VOCAB]` float32: what the toy model says behind these ids."""
    seed = zlib.crc32(array("l", read).tobytes())
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


@dataclass(frozen=True, eq=False)
class ToySaved:
    read: tuple[int, ...]

    @property
    def slots(self) -> int:
        return len(self.read)


class ToyPrefill:
    def __init__(
        self, views: Sequence[TokenPrefix], prompts: Sequence[PromptIds], bases: Sequence[Base | None]
    ) -> None:
        self._contexts = [rows_of(views if one.steered else (), one.ids, one.contexts) for one in prompts]
        self.rows = sum(map(len, self._contexts))
        # The generator's row goes on from the base's; what it takes over is what the base's row has read.
        kept = [0 if base is None else min(shared(one.ids, base.prompt.ids), len(one.ids) - 1)
                for one, base in zip(prompts, bases or [None] * len(prompts), strict=True)]  # fmt: skip
        for rows, count, base in zip(self._contexts, kept, bases, strict=False):
            if base is not None:
                rows[0][:count] = base.rows[0].read[:count]  # type: ignore[attr-defined]
        self.left = max(one.longest - count for one, count in zip(prompts, kept, strict=True))

    def advance(self, columns: int, given_up: Callable[[], bool]) -> bool:
        self.left -= 0 if given_up() else min(columns, self.left)
        return self.left == 0

    def finish(self) -> list[Computed]:
        return [
            Computed(torch.stack([toy_logits(read) for read in rows]), [ToySaved(tuple(read)) for read in rows])
            for rows in self._contexts
        ]


class ToyRunner:
    device = torch.device("cpu")
    limits = RunnerLimits(VOCAB, POSITIONS, frozenset({"tokens"}), continues=True, at_once=8)

    def __init__(self, views: Sequence[TokenPrefix] = ()) -> None:
        self.views = views
        self.weights = [view.weight for view in views]
        self._rows: list[tuple[Row, list[int]]] = []

    @property
    def rows(self) -> int:
        return len(self._rows)

    def slots(self, prompt: PromptIds) -> int:
        return prompt.slots(most_beside(self.views))

    def begin(self, prompts: Sequence[PromptIds], bases: Sequence[Base | None] = ()) -> ToyPrefill:
        return ToyPrefill(self.views, prompts, bases)

    def room(self, prompt: PromptIds, max_new_tokens: int) -> Room:
        return Room(1 + len(self.views) if prompt.steered else 1, self.slots(prompt) + max_new_tokens)

    def join(self, saved: Sequence[ToySaved], new: int) -> list[Row]:
        return [self._join(one) for one in saved]

    def _join(self, saved: ToySaved) -> Row:
        row = Row(len(self._rows), saved.slots)
        self._rows.append((row, list(saved.read)))
        return row

    def save(self, rows: Sequence[Row]) -> list[ToySaved]:
        return [ToySaved(tuple(self._rows[row.index][1])) for row in rows]

    def leave(self, row: Row) -> None:
        last = self._rows.pop()
        if last[0] is not row:
            last[0].index = row.index
            self._rows[row.index] = last

    def rewind(self, row: Row, slots: int) -> None:
        row.length -= slots
        del self._rows[row.index][1][row.length :]

    def decode(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.stack([self._feed(*row, fed) for row, fed in zip(self._rows, tokens, strict=True)])

    def _feed(self, row: Row, read: list[int], fed: Sequence[int]) -> torch.Tensor:
        read += fed
        row.length = len(read)
        return torch.stack([toy_logits(read[: len(read) - left]) for left in reversed(range(len(fed)))])

    def clear(self) -> None:
        self._rows.clear()

    def close(self) -> None:
        self._rows.clear()
