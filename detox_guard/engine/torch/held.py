"""What a row holds outside of the batch. Knows keys and values; knows no lanes, no steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Held", "LayerKV"]

LayerKV = Sequence[tuple[Tensor, Tensor]]
"""Each layer's keys and values, `[1, heads, slots, dim]`."""


@dataclass(frozen=True, eq=False)
class Held:
    """What a row holds, apart from the batch: keys and values of its own, behind what it sees of a context."""

    layers: LayerKV
    """Of its own: `[1, heads, slots, dim]` a layer."""
    context: Held | None = None
    """Rows with the same one share it; it has none itself. None: this is a context, and a row that is all of it."""
    kept: int = 0
    """How many of the context's first slots the row sees."""
    said: int = 0
    """How many of its own last slots are of the reply."""

    @property
    def slots(self) -> int:
        """Those that it holds itself: a context counts where it is held."""
        return int(self.layers[0][0].shape[2])
