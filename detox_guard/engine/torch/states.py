"""Rows of models whose layers keep more than keys and values. Knows transformers' cache layers; knows no requests.

A layer may keep slots (keys and values, an indexer's keys), states (of a convolution, of a recurrence), both, or
nothing. Slots lie in the batch as in `RowCache`; states have one entry a row. Slots are cut for a rewind. A state
cannot be run backwards: it is put back from a checkpoint, and the tokens since are read again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from detox_guard.engine.torch.cache import RowCache, RowLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detox_guard.engine.runner import Row

__all__ = ["CHECKPOINT", "History", "Past", "StateCache", "empty_cache", "keeps_rows"]

CHECKPOINT = 32
"""Tokens between two checkpoints of a row's states."""


class _WholeLayer(DynamicLayer):  # type: ignore[misc]
    """A layer with a window that keeps every slot: the mask hides what the window has passed."""

    is_sliding = True


class _WholeHybridLayer(LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """The same beside a state."""

    is_sliding = True


_KINDS = {
    DynamicLayer: DynamicLayer,
    DynamicSlidingWindowLayer: _WholeLayer,
    DynamicIndexedLayer: DynamicIndexedLayer,
    DummyLayer: DummyLayer,
    LinearAttentionLayer: LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer: LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: _WholeHybridLayer,
}
"""transformers' layers, exact types, and what takes their place in a row: the same, but whole."""


def keeps_rows(config: Any) -> bool:
    """Whether every layer of the cache for this config is of a kind that a `StateCache` can hold."""
    return all(type(layer) in _KINDS for layer in DynamicCache(config=config).layers)


def empty_cache(config: Any) -> Cache:
    """An empty cache for one row, in which every layer keeps all that it has seen."""
    return Cache(layers=[_like(layer) for layer in DynamicCache(config=config).layers])


def _like(layer: Any) -> Any:
    """An empty layer of the same kind."""
    kind = _KINDS.get(type(layer), type(layer))
    return kind(number_of_states=layer.number_of_states) if isinstance(layer, LinearAttentionLayer) else kind()


@dataclass(eq=False)
class Past:
    """What one row has read: a cache of batch 1, and how many tokens."""

    cache: Any
    length: int = 0
    history: History | None = None
    """How a row came to hold it, if one was saved as this: the row that is joined again can go back as far."""

    @property
    def slots(self) -> int:
        return self.length

    def fork(self) -> Past:
        """A copy that shares nothing, without a history."""
        return Past(copy.deepcopy(self.cache), self.length)


def _slots_of(layer: Any) -> tuple[Tensor, ...]:
    """What a layer of one row keeps a token, each `[1, heads, length, dim]`; empty if it keeps none."""
    if getattr(layer, "keys", None) is None:
        return ()
    if isinstance(layer, DynamicIndexedLayer) and layer.is_indexer_initialized:
        return layer.keys, layer.values, layer.indexer_keys.unsqueeze(1)
    return layer.keys, layer.values


def _states_of(layer: Any) -> list[tuple[dict[int, Any], dict[int, bool], int]]:
    """Where a layer keeps its states: (its dict, whether each is there, the key)."""
    if not isinstance(layer, LinearAttentionLayer):
        return []
    return [
        (states, there, i)
        for states, there in (
            (layer.conv_states, layer.is_conv_states_initialized),
            (layer.recurrent_states, layer.is_recurrent_states_initialized),
        )
        for i in states
    ]


class _RowHybridLayer(RowLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """Slots as in any row layer, states as in any linear one."""

    def __init__(self, owner: RowCache, *, is_sliding: bool, number_of_states: int) -> None:
        RowLayer.__init__(self, owner, is_sliding=is_sliding)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)


class _RowIndexedLayer(RowLayer):
    """Keys, values, and the keys of a sparse attention's indexer."""

    buffers = ("keys", "values", "index")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor, *index: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        rows, slots = self.owner.capacity
        self.index = index[0].new_zeros(rows, 1, slots, index[0].shape[3])

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        rows, lo, end = len(self.owner.rows), self.owner.view_lo, self.owner.end
        stop = end + indexer_key_states.shape[1]
        self.index[:rows, 0, end:stop] = indexer_key_states
        return self.index[:rows, 0, lo:stop]


@dataclass(eq=False)
class History:
    """Checkpoints of one row, oldest first, and the tokens that it was fed since the first of them."""

    checkpoints: list[Past]
    """Never written to."""
    tokens: list[int] = field(default_factory=list)

    def fork(self) -> History:
        """One that goes on from here on its own."""
        return History([*self.checkpoints], [*self.tokens])

    def feed(self, token: int) -> bool:
        """Note a token; True when the next checkpoint is due."""
        self.tokens.append(token)
        return len(self.tokens) % CHECKPOINT == 0

    def keep(self, past: Past) -> None:
        """Another checkpoint. The first stays for ever, of the others the last two: a rewind is seldom longer."""
        self.checkpoints = [*self.checkpoints[:1], *self.checkpoints[1:][-1:], past]

    def rewind(self, length: int) -> tuple[Past, list[int]]:
        """The last checkpoint at or before `length`, and the tokens between; what lies behind is forgotten."""
        first = self.checkpoints[0].length
        if length < first:
            raise ValueError(f"rewind to {length} slots in a row that was joined with {first}")
        self.checkpoints = [past for past in self.checkpoints if past.length <= length]
        del self.tokens[length - first :]
        last = self.checkpoints[-1]
        return last, self.tokens[last.length - first :]


class StateCache(RowCache):
    """A `RowCache` for layers of any of these kinds; its rows are joined from `Past`s.

    `read(past, tokens)` runs the model over tokens behind a `Past`, which is longer afterwards.
    """

    def __init__(self, max_rows: int, max_slots: int, read: Callable[[Past, Sequence[int]], object]) -> None:
        super().__init__(0, max_rows, max_slots)
        self.layers: list[Any] = []
        self._read = read
        self._histories: dict[Row, History] = {}

    def join(self, past: Past) -> Row:
        """A row that holds what `past` does."""
        if not self.layers:
            self.layers = [self._row_layer(layer) for layer in past.cache.layers]
            self._slotted = [layer for layer in self.layers if isinstance(layer, RowLayer)]
        parts = [parts for layer in past.cache.layers if (parts := _slots_of(layer))]
        row = self.add(parts, past.length)
        for mine, new in self._pairs(past.cache):
            _move_states(new, mine, lambda held, more: more.clone() if held is None else torch.cat([held, more]))
        if self._stateful:
            self._histories[row] = past.history.fork() if past.history else History([self._checkpoint(row)])
        return row

    def past(self, row: Row) -> Past:
        """A copy of what a row holds."""
        past = self._cut(row, row.length)
        self._take_states(row, past)
        if history := self._histories.get(row):
            past.history = history.fork()
        return past

    def remove(self, row: Row) -> None:
        order = list(range(len(self.rows)))
        order[row.index] = order[-1]
        order.pop()
        self._histories.pop(row, None)
        if order:
            for layer in self.layers:
                for states, there, i in _states_of(layer):
                    if there[i]:
                        states[i] = states[i][order]
        super().remove(row)

    def rewind(self, row: Row, slots: int) -> None:
        if slots == 0 or not self._stateful:
            super().rewind(row, slots)
            return
        checkpoint, tokens = self._histories[row].rewind(row.length - slots)
        past = self._cut(row, checkpoint.length)
        for kept, new in zip(checkpoint.cache.layers, past.cache.layers, strict=True):
            _move_states(kept, new, lambda _, state: state.clone())
        if tokens:
            self._read(past, tokens)
        self._put(row, past)

    def commit(self, tokens: Sequence[int]) -> None:
        """The forward pass fed `tokens[i]` to row i."""
        self.commit_slot()
        for row, history in self._histories.items():
            if history.feed(tokens[row.index]):
                history.keep(self._checkpoint(row))

    def clear(self) -> None:
        super().clear()
        self.layers, self._slotted = [], []
        self._histories.clear()

    @property
    def has_slots(self) -> bool:
        """Whether any layer keeps something of each token."""
        return bool(self._slotted)

    @property
    def _stateful(self) -> bool:
        return any(isinstance(layer, LinearAttentionLayer) for layer in self.layers)

    def _pairs(self, cache: Any) -> list[tuple[Any, Any]]:
        return list(zip(self.layers, cache.layers, strict=True))

    def _row_layer(self, layer: Any) -> Any:
        """The layer of the batch for a layer of one row that was filled."""
        if isinstance(layer, LinearAttentionAndFullAttentionLayer) and _slots_of(layer):
            return _RowHybridLayer(self, is_sliding=layer.is_sliding, number_of_states=layer.number_of_states)
        if isinstance(layer, LinearAttentionLayer):
            return LinearAttentionLayer(number_of_states=layer.number_of_states)
        if len(_slots_of(layer)) == 3:
            return _RowIndexedLayer(self)
        return RowLayer(self, is_sliding=layer.is_sliding) if _slots_of(layer) else DummyLayer()

    def _cut(self, row: Row, length: int) -> Past:
        """A copy of the first `length` slots of a row, without its states."""
        self.settle()
        past = Past(Cache(layers=[_single(layer) for layer in self.layers]), length)
        start = self.end - row.length
        at = (slice(row.index, row.index + 1), slice(None), slice(start, start + length))
        for mine, new in self._pairs(past.cache):
            if isinstance(mine, RowLayer):
                _fill(new, [buffer[at].clone() for buffer in mine.held()])
        return past

    def _put(self, row: Row, past: Past) -> None:
        """Write a `Past` over a row that is not shorter. The end stays where it is, also if no other row needs it."""
        start = self.end - past.length
        for mine, new in self._pairs(past.cache):
            if isinstance(mine, RowLayer):
                for buffer, part in zip(mine.held(), _slots_of(new), strict=True):
                    buffer[row.index, :, :start] = 0
                    buffer[row.index, :, start : self.end] = part[0]
            for (states, there, i), (other, _, _) in zip(_states_of(mine), _states_of(new), strict=True):
                if there[i]:
                    states[i][row.index] = other[i][0]
        row.length = past.length

    def _checkpoint(self, row: Row) -> Past:
        """The states of a row. Slots are cut, not put back, so none are copied."""
        layers = [_single(layer) if isinstance(layer, LinearAttentionLayer) else DummyLayer() for layer in self.layers]
        past = Past(Cache(layers=layers), row.length)
        self._take_states(row, past)
        return past

    def _take_states(self, row: Row, past: Past) -> None:
        """Copy the states of a row into `past`."""
        for mine, new in self._pairs(past.cache):
            _move_states(mine, new, lambda _, states: states[row.index : row.index + 1].clone())


def _move_states(source: Any, target: Any, moved: Callable[[Any, Tensor], Tensor]) -> None:
    """Set each state of `target` to `moved(its own, that of source)`, where `source` has one."""
    for (states, there, i), (held, is_held, _) in zip(_states_of(source), _states_of(target), strict=True):
        if there[i]:
            held[i] = moved(held[i], states[i])
            is_held[i] = target.has_previous_state[i] = True
            target.conv_kernel_size[i] = source.conv_kernel_size[i]


def _single(layer: Any) -> Any:
    """An empty layer of one row for a layer of the batch."""
    if isinstance(layer, _RowHybridLayer):
        kind = _WholeHybridLayer if layer.is_sliding else LinearAttentionAndFullAttentionLayer
        return kind(number_of_states=layer.number_of_states)
    if isinstance(layer, LinearAttentionLayer):
        return LinearAttentionLayer(number_of_states=layer.number_of_states)
    if isinstance(layer, _RowIndexedLayer):
        return DynamicIndexedLayer()
    if isinstance(layer, RowLayer):
        return _WholeLayer() if layer.is_sliding else DynamicLayer()
    return DummyLayer()


def _fill(layer: Any, parts: Sequence[Tensor]) -> None:
    layer.lazy_initialization(parts[0], parts[1])
    layer.keys, layer.values = parts[:2]
    if len(parts) == 3:
        layer.indexer_keys = parts[2].squeeze(1)
        layer.is_indexer_initialized = True
