"""What a decoding step is fed, and what a step is. Knows tokens and slots; knows no layer, no requests.

Rows lie in lanes (`lanes`): those of one request that share a context are queries over the same keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Feed", "Step", "agree"]

_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5}
_ROUNDED = 0.1
"""The same in 16 bits, where each of the two ways is some hundredths from the exact one."""


@dataclass(frozen=True)
class Feed:
    """What a step is fed: `n` tokens to each of its rows. Rows stand in the order of their lanes."""

    tokens: Tensor
    """`[rows, n]` int64."""
    positions: Tensor
    """`[rows, n]`: each token's place in its row."""
    slots: Tensor
    """`[rows, n]`: where in its lane its keys and values go."""
    lanes: Tensor
    """`[rows]`: each row's lane."""
    lines: Tensor | None
    """`[rows * n]`: each token's place among the queries of all lanes. None where that is their order."""
    shape: tuple[int, int]
    """Lanes, and the queries of one."""
    width: int
    """All slots that are seen or written are below it."""
    table: Tensor
    """`[some, slots]`: the position in a row of each slot that is the row's, also of those that it has not come to yet,
    which lie behind; -1 for others."""
    rows: Tensor
    """`[rows]`: each row's place in the table."""

    def seen(self, window: int | None = None) -> Tensor:
        """`[rows, n, width]` bool: the slots that each token sees, its own among them, in a layer with that window."""
        places = self.table[self.rows, : self.width].unsqueeze(1)
        behind = torch.arange(self.width, device=places.device) <= self.slots.unsqueeze(-1)
        nearest = 0 if window is None else (self.positions.unsqueeze(-1) - window + 1).clamp_min(0)
        return behind & (places >= nearest)

    def spread(self, x: Tensor) -> Tensor:
        """`x` `[tokens, ...]` as queries `[lanes * queries, ...]`, zeros where a lane has fewer."""
        if self.lines is None:
            return x
        lanes, most = self.shape
        return x.new_zeros(lanes * most, *x.shape[1:]).index_copy_(0, self.lines, x)

    def collect(self, x: Tensor) -> Tensor:
        """The other way round."""
        return x if self.lines is None else x[self.lines]

    def copy(self, other: Feed) -> None:
        """Take over what another one of the same kind is fed."""
        for name in ("tokens", "positions", "slots", "lanes", "rows"):
            getattr(self, name).copy_(getattr(other, name))


class Step(Protocol):
    """One pass over the last tokens of all rows."""

    @property
    def even(self) -> bool:
        """Whether each lane must have as many queries as any other."""

    def __call__(self, feed: Feed, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Logits `[rows, n, vocab]` float32. Writes the tokens' keys and values into the buffers
        `[some, heads, some, dim]` of each layer."""


def agree(logits: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways to compute the same logits, in this number type, differ by rounding only.

    What counts is the mean square of the difference, beside that of the logits about their mean.
    """
    exact = exact.float() - exact.float().mean(-1, keepdim=True)
    logits = logits - logits.mean(-1, keepdim=True)
    off = (logits - exact).square().mean(-1).sqrt()
    return bool((off <= exact.square().mean(-1).sqrt() * _TOLERANCE.get(dtype, _ROUNDED)).all())
