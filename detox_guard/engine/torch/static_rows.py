"""The running batch of a `StaticStep`. Knows rows, slots and buffers; knows no layer, no requests.

Rows are aligned on the left::

    slot      0                          width
    row 0     [k k k k k k k k k k k] . .|       a row is its first `length` slots; what stands behind is not seen
    row 1     [k k k k k k k] . . . . . .|       and always finite (a NaN times a zero weight is still a NaN)

so a rewind only shortens a row, and nothing is moved.

On a GPU a step is recorded once for so many rows and slots (`graphs`), and rounded up to what was recorded. The spare
rows of such a step write where the next row that joins writes over.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from detox_guard.engine.runner import Row
from detox_guard.engine.torch.static import agree
from detox_guard.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detox_guard.engine.torch.cache import LayerKV
    from detox_guard.engine.torch.static import StaticStep

    Replay = Callable[[], Tensor]
    Record = Callable[[Replay], Replay]

__all__ = ["StaticRows"]

_log = logging.getLogger("detox_guard.engine")

_MIN_SLOTS = 128
_BUCKET = 256
"""The least slots that a step is recorded for."""


class StaticRows:
    """Rows that join, leave, rewind and take a step. Not thread-safe; one engine thread owns it.

    Its buffers have room to spare, but not for more than `max_rows` rows and `max_slots` slots in all unless what is
    asked for needs more. `record` makes of a step one that can be replayed; without it each step is run. After an error
    (of memory) it is not to be used until it is cleared.
    """

    def __init__(
        self,
        step: StaticStep,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int,
        max_slots: int,
        record: Record | None = None,
    ) -> None:
        self._step, self._device, self._dtype = step, device, dtype
        self._max_rows, self._max_slots = max_rows, max_slots
        self._record = record
        self.rows: list[Row] = []
        self.capacity = (0, 0)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._overflowed = False
        """A step gave what is no number, so what a rewind drops may hold some."""
        self._recorded: dict[tuple[int, int, int], tuple[Tensor, Tensor, Replay]] = {}

    @property
    def longest(self) -> int:
        return max((row.length for row in self.rows), default=0)

    def add(self, layers: LayerKV) -> Row:
        """Join a row with the K/V `[1, heads, length, dim]` of each layer."""
        row = Row(len(self.rows), layers[0][0].shape[2])
        if not self._keys:
            self._keys = [k.new_zeros(0, k.shape[1], 0, k.shape[3]) for k, _ in layers]
            self._values = [v.new_zeros(0, v.shape[1], 0, v.shape[3]) for _, v in layers]
        self._reserve(len(self.rows) + 1, max(row.length, self.longest))
        for i, (k, v) in enumerate(layers):
            for buffer, given in ((self._keys[i], k), (self._values[i], v)):
                buffer[row.index, :, : row.length] = given[0]
                buffer[row.index, :, row.length :] = 0
        self.rows.append(row)
        return row

    def copy(self, row: Row) -> LayerKV:
        """What `add` takes to put the row back."""
        at = (slice(row.index, row.index + 1), slice(None), slice(row.length))
        return [(k[at].clone(), v[at].clone()) for k, v in zip(self._keys, self._values, strict=True)]

    def remove(self, row: Row) -> None:
        """Drop a row; the last one takes its place. With no row left the buffers are freed, if nothing is recorded."""
        last = self.rows.pop()
        if last is not row:
            for buffer in (*self._keys, *self._values):
                buffer[row.index, :, : last.length] = buffer[last.index, :, : last.length]
                buffer[row.index, :, last.length :] = 0
            self.rows[row.index] = last
            last.index = row.index
        if not self.rows and not self._recorded:
            self.clear()

    def rewind(self, row: Row, slots: int) -> None:
        """Drop the last `slots` entries of one row."""
        if not 0 <= slots < row.length:
            raise ValueError(f"rewind of {slots} slots in a row of {row.length}")
        row.length -= slots
        if self._overflowed and slots:
            for buffer in (*self._keys, *self._values):
                buffer[row.index, :, row.length : row.length + slots] = 0

    def decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed `tokens[i]` to row i, to each as many; logits `[rows, tokens of a row, vocab]`. Every row is so many
        slots longer afterwards."""
        if len(tokens) != len(self.rows):
            raise StepError(f"{len(tokens)} tokens for {len(self.rows)} rows")
        count = len(tokens[0])
        width = self.longest + count
        self._reserve(len(self.rows), width)
        ids, slots = torch.tensor(tokens), torch.tensor([[*range(r.length, r.length + count)] for r in self.rows])
        if self._record is None:
            logits = self._step(ids.to(self._device), slots.to(self._device), width, self._keys, self._values)
        else:
            logits = self._replayed(self._record, ids, slots, width)
        for row in self.rows:
            row.length += count
        # Keys or values that are no numbers show at their own token, for it sees itself.
        self._overflowed = self._overflowed or not bool(logits.sum().isfinite())
        return logits

    def clear(self) -> None:
        """Forget all rows and free the buffers."""
        self.rows.clear()
        self._recorded.clear()
        self._keys, self._values = [], []
        self._overflowed = False
        self.capacity = (0, 0)

    def _replayed(self, record: Record, ids: Tensor, slots: Tensor, width: int) -> Tensor:
        """A step as it was recorded for so many rows and slots, or a bit more. The first of each kind is run, recorded,
        and replayed to see that it gives the same."""
        used, count = ids.shape
        rows = min(_power(used, 2), self.capacity[0])
        width = min(_power(width, _BUCKET), self.capacity[1])
        known = self._recorded.get((rows, width, count))
        if known is not None:
            own_ids, own_slots, replay = known
            # Spare rows write where they last did. A row that joins writes over what it sees of that.
            own_ids[:used].copy_(ids)
            own_slots[:used].copy_(slots)
            return replay()[:used].clone()
        own_ids = torch.zeros(rows, count, dtype=torch.long, device=self._device)
        own_slots = torch.arange(count, device=self._device).repeat(rows, 1)
        own_ids[:used].copy_(ids)
        own_slots[:used].copy_(slots)

        def run() -> Tensor:
            return self._step(own_ids, own_slots, width, self._keys, self._values)

        logits = run()
        try:
            replay = record(run)
            good = agree(replay(), logits, self._dtype)
            reason = "a replayed step computes something else"
        except RuntimeError as error:
            good, reason = False, str(error)
        if good:
            self._recorded[rows, width, count] = (own_ids, own_slots, replay)
        else:
            _log.warning("steps are not recorded, which is slower: %s", reason)
            self._record = None
            self._recorded.clear()
        return logits[:used].clone()

    def _reserve(self, rows: int, slots: int) -> None:
        """Room for `rows` rows of up to `slots` slots."""
        old_rows, old_slots = self.capacity
        if rows <= old_rows and slots <= old_slots:
            return
        most_rows = min(self._max_rows, self._max_slots // slots)
        new_rows = old_rows if rows <= old_rows <= most_rows else max(rows, min(2 * old_rows, most_rows))
        # Growing by half again amortises the copy.
        room = max(_MIN_SLOTS, slots * 3 // 2, old_slots if slots * 3 // 2 <= old_slots else 0)
        if self._record is not None:
            new_rows = max(new_rows, min(_power(rows, 2), most_rows))
            room = max(room, _power(slots, _BUCKET))
        new_slots = max(slots, min(room, self._max_slots // new_rows))
        self._recorded.clear()
        used, width = len(self.rows), self.longest
        for buffers in (self._keys, self._values):
            for i, old in enumerate(buffers):
                buffers[i] = old.new_zeros(new_rows, old.shape[1], new_slots, old.shape[3])
                buffers[i][:used, :, :width] = old[:used, :, :width]
        self.capacity = (new_rows, new_slots)


def _power(number: int, least: int) -> int:
    """The least power of two times `least` that is not below `number`."""
    while least < number:
        least *= 2
    return least
