"""The running batch, rows that share a context beside each other. Knows rows, slots and buffers; knows no layer.

A *lane* is one stretch of memory for each layer's keys and values. Rows of one request that share a context lie in one
lane, which holds the context once::

    slot    0            context     start                         width
    lane 0  [c c c c c c c c c][b b b][a b a b a b . . . . . . . .]|
    lane 1  [c c c c][a a a a a a a a a a a a a a a . . . . . . . .]|

A row sees the context (or the beginning of it), what it brought of its own (`b b b`), and its turns behind `start`. A
later turn lies in a higher slot, so a token sees what is its row's up to its own slot. A rewind only shortens a row,
and nothing is moved. What a row does not see must be finite, for a NaN times a zero weight is still a NaN: so one stays
within its lane.

Where the reply may become longer than the context, each row has a lane of its own, with a copy of the context: all
lanes are as wide as the widest, and a step reads the turns of all rows of a lane.

On a GPU a step is recorded once for so many lanes and slots (`graphs`), and rounded up to what was recorded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from detox_guard.engine.runner import Row
from detox_guard.engine.torch.cache import grown
from detox_guard.engine.torch.feed import Feed, agree
from detox_guard.engine.torch.held import Held
from detox_guard.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detox_guard.engine.torch.feed import Step
    from detox_guard.engine.torch.held import LayerKV

    Replay = Callable[[], Tensor]
    Record = Callable[[Replay], Replay]

__all__ = ["Lanes"]

_log = logging.getLogger("detox_guard.engine")

_BUCKET = 256
"""The least slots that a step is recorded for."""


@dataclass(eq=False)
class _Lane:
    index: int
    start: int
    """The first slot of the turns."""
    turns: int
    """Rows that take turns, also those that have left."""
    places: list[_Place] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Behind the last slot in use."""
        return self.start + self.turns * max((place.said for place in self.places), default=0)


@dataclass(eq=False)
class _Place:
    """Where a row lies: it sees the first `kept` slots of its lane, `own` slots from `first` on, and its turns."""

    row: Row
    lane: _Lane
    turn: int
    kept: int
    first: int
    own: int
    said: int = 0

    def slots(self, begin: int, count: int) -> list[int]:
        """Those of its turns."""
        first = self.lane.start + self.turn
        return [first + said * self.lane.turns for said in range(begin, begin + count)]

    def behind(self) -> list[int]:
        """All its slots behind the context."""
        return [*range(self.first, self.first + self.own), *self.slots(0, self.said)]

    def rewind(self, slots: int) -> list[int]:
        """Drop its last slots, and tell which of them nobody else sees."""
        said = min(slots, self.said)
        own = min(slots - said, self.own)
        dropped = [*self.slots(self.said - said, said), *range(self.first + self.own - own, self.first + self.own)]
        self.said -= said
        self.own -= own
        self.kept -= slots - said - own
        self.row.length -= slots
        return dropped


class Lanes:
    """Rows that join, leave, rewind and take a step. Not thread-safe; one engine thread owns it.

    Its buffers have room to spare, but not for more than `max_rows` lanes and `max_slots` slots in all unless what is
    asked for needs more. `record` makes of a step one that can be replayed; without it each step is run. After an error
    (of memory) it is not to be used until it is cleared.
    """

    def __init__(
        self, step: Step, device: torch.device, max_rows: int, max_slots: int, record: Record | None = None
    ) -> None:
        self._step, self._device = step, device
        self._max_rows, self._max_slots = max_rows, max_slots
        self._record = record
        self.rows: list[Row] = []
        self.capacity = (0, 0)
        """Lanes, and the slots of each."""
        self._lanes: list[_Lane] = []
        self._places: dict[Row, _Place] = {}
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._table = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._overflowed = False
        """A step gave what is no number, so what a rewind drops may hold some."""
        self._recorded: dict[tuple[int, ...], tuple[Feed, Replay]] = {}

    @property
    def longest(self) -> int:
        """The slots that the longest lane uses."""
        return max((lane.end for lane in self._lanes), default=0)

    def join(self, held: Sequence[Held], new: int) -> list[Row]:
        """The rows of one request, in the order of `held`. Rows share a context that is not shorter than `new`, the
        tokens of its reply at the most."""
        roots = [one.context or one for one in held]
        rows: dict[int, Row] = {}
        for root in dict.fromkeys(roots):
            some = [i for i, other in enumerate(roots) if other is root]
            for together in [some] if root.slots >= new else [[i] for i in some]:
                rows |= zip(together, self._join(root, [held[i] for i in together]), strict=True)
        return [rows[i] for i in range(len(held))]

    def _join(self, root: Held, held: Sequence[Held]) -> list[Row]:
        """Rows behind `root`, in one lane."""
        if not self._keys:
            self._keys = [k.new_zeros(0, k.shape[1], 0, k.shape[3]) for k, _ in root.layers]
            self._values = [v.new_zeros(0, v.shape[1], 0, v.shape[3]) for _, v in root.layers]
        brought = [0 if one is root else one.slots - one.said for one in held]
        lane = _Lane(len(self._lanes), root.slots + sum(brought), len(held))
        end = lane.start + lane.turns * max(one.said for one in held)
        self._reserve(len(self._lanes) + 1, max(end, self.longest), len(self.rows) + len(held))
        self._lanes.append(lane)
        for buffer in (*self._keys, *self._values):
            buffer[lane.index, :, root.slots :] = 0
        self._write(lane, range(root.slots), root.layers)
        first, joined = root.slots, []
        for turn, (one, own) in enumerate(zip(held, brought, strict=True)):
            kept = root.slots if one is root else one.kept
            place = _Place(Row(len(self.rows), kept + own + one.said), lane, turn, kept, first, own, one.said)
            if one is not root:
                self._write(lane, place.behind(), one.layers)
            first += own
            lane.places.append(place)
            self.rows.append(place.row)
            self._places[place.row] = place
            self._paint(place)
            joined.append(place.row)
        return joined

    def _write(self, lane: _Lane, slots: Sequence[int], layers: LayerKV) -> None:
        at = slice(slots.start, slots.stop) if isinstance(slots, range) else torch.tensor(slots, dtype=torch.long)
        for k, v, (new_k, new_v) in zip(self._keys, self._values, layers, strict=True):
            k[lane.index][:, at], v[lane.index][:, at] = new_k[0], new_v[0]

    def save(self, rows: Sequence[Row]) -> list[Held]:
        """What `join` takes to put the rows of one request back."""
        held: dict[Row, Held] = {}
        for lane in dict.fromkeys(self._places[row].lane for row in rows):
            places = [place for row in rows if (place := self._places[row]).lane is lane]
            context = Held(self._copy(lane, range(max(place.kept for place in places))))
            for place in places:
                held[place.row] = Held(self._copy(lane, place.behind()), context, place.kept, place.said)
        return [held[row] for row in rows]

    def _copy(self, lane: _Lane, slots: Sequence[int]) -> LayerKV:
        at = torch.tensor(list(slots), dtype=torch.long)
        return [
            (k[lane.index : lane.index + 1, :, at.to(k.device)], v[lane.index : lane.index + 1, :, at.to(v.device)])
            for k, v in zip(self._keys, self._values, strict=True)
        ]

    def remove(self, row: Row) -> None:
        """Drop a row; the last one takes its index. With no row left the buffers are freed, if nothing is recorded."""
        lane = self._places.pop(row).lane
        lane.places = [place for place in lane.places if place.row is not row]
        last = self.rows.pop()
        if last is not row:
            self.rows[row.index] = last
            last.index = row.index
            self._paint(self._places[last])
        if not lane.places:
            self._free(lane)
        if not self.rows and not self._recorded:
            self.clear()

    def _free(self, lane: _Lane) -> None:
        """The last lane takes the place of one that is empty."""
        last = self._lanes.pop()
        end, left = last.end, last.index
        for buffer in (*self._keys, *self._values):
            if last is not lane:
                buffer[lane.index, :, :end] = buffer[left, :, :end]
                buffer[lane.index, :, end:] = 0
            if self._overflowed:
                buffer[left] = 0  # a recorded step may read it
        if last is not lane:
            self._lanes[lane.index] = last
            last.index = lane.index

    def rewind(self, row: Row, slots: int) -> None:
        """Drop the last `slots` entries of one row."""
        if not 0 <= slots < row.length:
            raise ValueError(f"rewind of {slots} slots in a row of {row.length}")
        place = self._places[row]
        brought = slots > place.said
        dropped = place.rewind(slots)
        if brought:
            self._paint(place)
        if self._overflowed:
            self._clean(place.lane, dropped)
            self._clean(place.lane, slice(place.lane.end, None))  # also what was written for nobody

    def _clean(self, lane: _Lane, slots: slice | list[int]) -> None:
        for buffer in (*self._keys, *self._values):
            buffer[lane.index][:, slots] = 0

    def decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed `tokens[i]` to row i, to each as many; logits `[rows, tokens of a row, vocab]`. Every row is so many
        slots longer afterwards."""
        if len(tokens) != len(self.rows):
            raise StepError(f"{len(tokens)} tokens for {len(self.rows)} rows")
        count = len(tokens[0])
        even = self._step.even or self._record is not None
        # Where each lane has as many queries, tokens that are nobody's go to a slot behind all others.
        width = max(lane.end + lane.turns * count for lane in self._lanes) + even
        self._reserve(len(self._lanes), width)
        if self._record is None:
            lanes = len(self._lanes)
            logits = self._step(self._feed(tokens, lanes, width, even), self._keys, self._values)
        else:
            logits = self._replayed(self._record, tokens, width)
        found = self._found(even)
        if found != list(range(len(logits))):
            logits = logits[found]
        for place in self._places.values():
            place.said += count
            place.row.length += count
        # Keys or values that are no numbers show at their own token, for it sees itself.
        self._overflowed = self._overflowed or not bool(logits.sum().isfinite())
        return logits

    def clear(self) -> None:
        """Forget all rows and free the buffers."""
        self.rows.clear()
        self._lanes.clear()
        self._places.clear()
        self._recorded.clear()
        self._keys, self._values = [], []
        self._table = self._table.new_zeros(0, 0)
        self._overflowed = False
        self.capacity = (0, 0)

    @property
    def _most(self) -> int:
        """The rows of the lane that has most."""
        return max(len(lane.places) for lane in self._lanes)

    def _found(self, even: bool) -> list[int]:
        """Where in a step's feed each row is."""
        found, at, most = [0] * len(self.rows), 0, self._most
        for lane in self._lanes:
            for i, place in enumerate(lane.places):
                found[place.row.index] = at + i
            at += most if even else len(lane.places)
        return found

    def _feed(self, tokens: Sequence[Sequence[int]], lanes: int, width: int, even: bool) -> Feed:
        """What a step of so many lanes and slots is fed. `even`: each lane gets as many queries, some are nobody's."""
        count, most = len(tokens[0]), self._most
        fed: list[tuple[int, Row | None, list[int]]] = []
        lines: list[int] = []
        for index in range(lanes):
            places = self._lanes[index].places if index < len(self._lanes) else []
            fed += [(index, place.row, place.slots(place.said, count)) for place in places]
            lines += range(index * most * count, (index * most + len(places)) * count)
            if even:
                # What is nobody's is what a row of the lane is fed, so it is as finite as that.
                fed += [(index, places[0].row if places else None, [width - 1] * count)] * (most - len(places))
        rows = [row for _, row, _ in fed]
        starts = self._tensor([row.length if row else 0 for row in rows])
        return Feed(
            tokens=self._tensor([[*tokens[row.index]] if row else [0] * count for row in rows]),
            positions=starts.unsqueeze(-1) + torch.arange(count, device=self._device),
            slots=self._tensor([slots for _, _, slots in fed]),
            lanes=self._tensor([index for index, _, _ in fed]),
            lines=None if even or len(lines) == lanes * most * count else self._tensor(lines),
            shape=(lanes, most * count),
            width=width,
            table=self._table,
            rows=self._tensor([row.index if row else 0 for row in rows]),
        )

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, device=self._device)

    def _replayed(self, record: Record, tokens: Sequence[Sequence[int]], width: int) -> Tensor:
        """A step as it was recorded for so many lanes and slots, or a bit more. The first of each kind is run,
        recorded, and replayed to see that it gives the same."""
        lanes = min(_power(len(self._lanes), 1), self.capacity[0])
        width = min(_power(width, _BUCKET), self.capacity[1])
        feed = self._feed(tokens, lanes, width, True)
        kind = (*feed.shape, len(tokens[0]), width)
        if kind in self._recorded:
            own, replay = self._recorded[kind]
            own.copy(feed)
            return replay().clone()

        def run() -> Tensor:
            return self._step(feed, self._keys, self._values)

        logits, found = run(), self._found(True)
        if not bool(logits[found].sum().isfinite()):
            return logits  # nothing to compare with
        try:
            replay = record(run)
            good = agree(replay()[found], logits[found], self._keys[0].dtype)
            reason = "a replayed step computes something else"
        except RuntimeError as error:
            good, reason = False, str(error)
        if good:
            self._recorded[kind] = (feed, replay)
        else:
            _log.warning("steps are not recorded, which is slower: %s", reason)
            self._record = None
            self._recorded.clear()
        return logits

    def _paint(self, place: _Place) -> None:
        """Write down which slots are a row's, and where in the row."""
        line = self._table[place.row.index]
        line.fill_(-1)
        begin = place.lane.start + place.turn
        for slots, before in (
            (line[: place.kept], 0),
            (line[place.first : place.first + place.own], place.kept),
            (line[begin :: place.lane.turns], place.kept + place.own),
        ):
            slots.copy_(torch.arange(before, before + len(slots), device=line.device))

    def _reserve(self, lanes: int, slots: int, rows: int = 0) -> None:
        """Room for so many lanes of up to so many slots, and for so many rows."""
        old_lanes, old_slots = self.capacity
        if lanes <= old_lanes and slots <= old_slots and rows <= len(self._table):
            return
        wished = (0, 0) if self._record is None else (_power(lanes, 1), _power(slots, _BUCKET))
        most = (self._max_rows, self._max_slots)
        new_lanes, new_slots = grown(self.capacity, lanes, slots, most, wished)
        self._recorded.clear()
        used, width = len(self._lanes), self.longest
        for buffers in (self._keys, self._values):
            for i, old in enumerate(buffers):
                buffers[i] = old.new_zeros(new_lanes, old.shape[1], new_slots, old.shape[3])
                buffers[i][:used, :, :width] = old[:used, :, :width]
        self.capacity = (new_lanes, new_slots)
        self._table = self._table.new_full((max(rows, self._max_rows, len(self._table)), new_slots), -1)
        for place in self._places.values():
            self._paint(place)


def _power(number: int, least: int) -> int:
    """The least power of two times `least` that is not below `number`."""
    while least < number:
        least *= 2
    return least
