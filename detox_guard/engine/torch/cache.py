"""A cache whose rows are aligned at their last slot, for models that make their own masks. Knows rows and slots.

All rows share one slot counter and are right-aligned at it::

    slot      0         lo                    end
    row 0     . . . . . [k k k k k k k k k k k]|      a row is its last `length` slots; what stands left of it is masked
    row 1     . . . . . . . . . [k k k k k k k]|      and always finite (a NaN times a zero weight is still a NaN)

so a decoding step writes the same columns for everybody, and joining, leaving and rewinding touch one row each. What
all rows drop between two steps costs nothing: the end goes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from detox_guard.engine.runner import Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["OwnLayer", "RowCache", "RowLayer", "grown"]

_MIN_SLOTS = 128


def grown(
    old: tuple[int, int], rows: int, slots: int, most: tuple[int, int], wished: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """The capacity (rows, slots of each) that takes the place of `old`: for what is needed, with room to spare.

    `wished`: a capacity to come near to. It is held to `most` (rows, slots in all), unless what is needed is more.
    """
    old_rows, old_slots = old
    most_rows = min(most[0], most[1] // slots)
    new_rows = old_rows if rows <= old_rows <= most_rows else max(rows, min(2 * old_rows, most_rows))
    new_rows = max(new_rows, min(wished[0], most_rows))
    # Growing by half again amortises the copy.
    room = max(_MIN_SLOTS, slots * 3 // 2, old_slots if slots * 3 // 2 <= old_slots else 0, wished[1])
    return new_rows, max(slots, min(room, most[1] // new_rows))


class OwnLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer in memory of ours. Transformers makes nothing here, and only asks how much there is."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to make."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's buffers `[row capacity, heads, slot capacity, dim]`; where to write is the `RowCache`'s to say.

    Every slot is kept, in layers with a window too: the mask hides what a window has passed.
    """

    buffers: tuple[str, ...] = ("keys", "values")
    """The attributes that hold slots."""

    def __init__(self, owner: RowCache, *, is_sliding: bool = False) -> None:
        super().__init__()
        self.owner = owner
        self.is_sliding = is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, slots = self.owner.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], slots, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], slots, value_states.shape[3])
        self.is_initialized = True

    def held(self) -> list[Tensor]:
        """Its buffers."""
        return [getattr(self, name) for name in self.buffers]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows, lo, end = len(self.owner.rows), self.owner.view_lo, self.owner.end
        if key_states.shape[0] != rows:
            raise RuntimeError(f"{key_states.shape[0]} rows computed for a cache of {rows}")
        stop = end + key_states.shape[2]
        self.keys[:rows, :, end:stop] = key_states
        self.values[:rows, :, end:stop] = value_states
        return self.keys[:rows, :, lo:stop], self.values[:rows, :, lo:stop]

    def get_seq_length(self) -> int:
        return self.owner.end - self.owner.lo

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):  # type: ignore[misc]
    """A transformers `Cache` whose rows join, leave and rewind. Not thread-safe; one engine thread owns it.

    Its buffers have room to spare, but not for more than `max_rows` rows and `max_slots` slots in all unless what is
    asked for needs more. After an error (of memory) it is not to be used until it is cleared.
    """

    def __init__(self, num_layers: int, max_rows: int, max_slots: int) -> None:
        super().__init__(layers=[RowLayer(self) for _ in range(num_layers)])
        self._slotted: list[RowLayer] = self.layers
        """The layers that hold slots: here all of them."""
        self._max_rows, self._max_slots = max_rows, max_slots
        self.rows: list[Row] = []
        self.end = 0
        self.view_lo = 0
        self.capacity = (0, 0)
        self._dropped: dict[Row, int] = {}
        """Slots that were dropped at the end of a row, and are still there."""

    @property
    def lo(self) -> int:
        """The first slot any row uses."""
        return self.end - max((row.length for row in self.rows), default=0)

    def add(self, layers: Sequence[Sequence[Tensor]], length: int) -> Row:
        """Join a row with what each layer keeps of its slots: `[1, heads, length, dim]` each."""
        self.settle()
        self._reserve(len(self.rows) + 1, length)
        row = Row(len(self.rows), length)
        start = self.end - length
        for layer, parts in zip(self._slotted, layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(*parts)
            for name, new in zip(layer.buffers, parts, strict=True):
                buffer = getattr(layer, name)
                buffer[row.index, :, :start] = 0
                buffer[row.index, :, start : self.end] = new[0]
        self.rows.append(row)
        return row

    def remove(self, row: Row) -> None:
        """Drop a row; the last one takes its place. With no row left the buffers are freed."""
        self.settle()
        last = self.rows.pop()
        if last is not row:
            start = self.end - last.length
            for layer in self._slotted:
                for buffer in layer.held():
                    buffer[row.index, :, :start] = 0
                    buffer[row.index, :, start : self.end] = buffer[last.index, :, start : self.end]
            self.rows[row.index] = last
            last.index = row.index
        if not self.rows:
            self.clear()

    def rewind(self, row: Row, slots: int) -> None:
        """Drop the last `slots` entries of one row."""
        if not 0 <= slots < row.length:
            raise ValueError(f"rewind of {slots} slots in a row of {row.length}")
        if slots:
            self._dropped[row] = self._dropped.get(row, 0) + slots
            row.length -= slots

    def settle(self) -> None:
        """Right-align the rows that were rewound."""
        if not self._dropped:
            return
        common = min(self._dropped.get(row, 0) for row in self.rows)
        self.end -= common
        for row, dropped in self._dropped.items():
            if slots := dropped - common:
                stop = self.end - slots
                start = stop - row.length
                for layer in self._slotted:
                    for buffer in layer.held():
                        # A copy first: source and target overlap.
                        buffer[row.index, :, start + slots : self.end] = buffer[row.index, :, start:stop].clone()
                        buffer[row.index, :, start : start + slots] = 0
        self._dropped.clear()

    def open_slot(self) -> Tensor:
        """Make room for another slot; the mask `[rows, slots]` (True = attend) of the step to come."""
        self.settle()
        self._reserve(len(self.rows), self.end + 1 - self.lo, right=1)
        self.view_lo = self.lo
        slots = torch.arange(self.end + 1 - self.view_lo)
        starts = torch.tensor([len(slots) - 1 - row.length for row in self.rows])
        return slots >= starts.unsqueeze(-1)

    def commit_slot(self) -> None:
        """The forward pass wrote its column: every row is a slot longer."""
        self.end += 1
        for row in self.rows:
            row.length += 1

    def clear(self) -> None:
        """Forget all rows and free the buffers."""
        self.rows.clear()
        self._dropped.clear()
        self.end = 0
        self.capacity = (0, 0)
        for layer in self._slotted:
            for name in layer.buffers:
                setattr(layer, name, None)
            layer.is_initialized = False

    def _reserve(self, rows: int, length: int, *, right: int = 0) -> None:
        """Room for `rows` rows of up to `length` slots, `right` of them right of what there is."""
        lo, used = self.lo, self.end - self.lo
        old_rows, old_slots = self.capacity
        fits = rows <= old_rows and length <= self.end + right and self.end + right <= old_slots
        if fits:
            return
        need, most = max(length, used + right), (self._max_rows, self._max_slots)
        new_rows, new_slots = grown(self.capacity, rows, need, most)
        end = max(length - right, used)
        for layer in self._slotted:
            for name in layer.buffers if layer.is_initialized else ():
                moved = _moved(getattr(layer, name), new_rows, new_slots, len(self.rows), slice(lo, self.end), end)
                setattr(layer, name, moved)
        self.end = end
        self.capacity = (new_rows, new_slots)


def _moved(buffer: Tensor, rows: int, slots: int, used_rows: int, used: slice, end: int) -> Tensor:
    """A new buffer that holds `buffer[:used_rows, :, used]` right-aligned at `end`, zeros elsewhere."""
    out = buffer.new_zeros(rows, buffer.shape[1], slots, buffer.shape[3])
    width = used.stop - used.start
    out[:used_rows, :, end - width : end] = buffer[:used_rows, :, used]
    return out
