"""The runner for models that make their own masks. Knows how prompts, rows and rewinds go together; knows no layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard.detoxifiers.base import most_beside
from detox_guard.engine.runner import Computed, Room, RunnerLimits, rows_for
from detox_guard.engine.torch.alone import AloneRows
from detox_guard.engine.torch.packing import can_pack, pack_linears
from detox_guard.engine.torch.reader import Reader
from detox_guard.engine.torch.solo import SoloPrefill
from detox_guard.engine.torch.states import Past, StateCache
from detox_guard.models.quantization import INT4

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.base import Bounds, PromptIds
    from detox_guard.engine.runner import Base, Row, Saved
    from detox_guard.models.backbone import Backbone

__all__ = ["SoloRunner"]


class SoloRunner:
    """Runs a backbone and its views (a `Runner`), each prompt alone; rows share a pass where its layout lets them."""

    def __init__(self, backbone: Backbone, views: Sequence[View], bounds: Bounds) -> None:
        if bounds.pack_weights and can_pack(backbone.model):
            pack_linears(backbone.model, smallest=backbone.quantization == INT4)
        self._reader = Reader(backbone, views)
        together = backbone.running.layout == "rows"
        self._batch: StateCache | AloneRows = (
            StateCache(bounds.max_rows, bounds.max_cached_slots, self._reader.read)
            if together
            else AloneRows(self._reader)
        )
        self.device: torch.device = self._reader.device
        self.weights = tuple(view.weight for view in views)
        self._beside = most_beside(views)
        self.limits = RunnerLimits(backbone.vocab_size, backbone.max_positions, backbone.running.view_kinds)

    @property
    def rows(self) -> int:
        return len(self._batch.rows)

    def slots(self, prompt: PromptIds) -> int:
        return prompt.slots(self._beside)

    def room(self, prompt: PromptIds, max_new_tokens: int) -> Room:
        return Room(rows_for(prompt, self), self.slots(prompt) + max_new_tokens)

    def begin(self, prompts: Sequence[PromptIds], bases: Sequence[Base | None] = ()) -> _Prefill:
        # States cannot be cut, so nobody goes on from a base: `limits` says so.
        return _Prefill(SoloPrefill(self._reader, prompts))

    def join(self, saved: Sequence[Saved], new: int) -> list[Row]:
        return [self._join(one) for one in saved]

    def _join(self, saved: Saved) -> Row:
        assert isinstance(saved, Past)
        return self._batch.join(saved)

    def save(self, rows: Sequence[Row]) -> list[Past]:
        return [self._batch.past(row) for row in rows]

    def leave(self, row: Row) -> None:
        self._batch.remove(row)

    def rewind(self, row: Row, slots: int) -> None:
        self._batch.rewind(row, slots)

    def decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        single = [token for (token,) in tokens]
        if isinstance(self._batch, AloneRows):
            return self._batch.decode(single).unsqueeze(1)
        return self._reader.decode(self._batch, single).unsqueeze(1)

    def clear(self) -> None:
        self._batch.clear()

    def close(self) -> None:
        self._batch.clear()


class _Prefill:
    """A `SoloPrefill` as the scheduler knows it."""

    def __init__(self, prompts: SoloPrefill) -> None:
        self._prompts = prompts

    rows = 1

    @property
    def left(self) -> int:
        return self._prompts.total - self._prompts.done_tokens

    def advance(self, columns: int, given_up: Callable[[], bool]) -> bool:
        return self._prompts.advance(columns)

    def finish(self) -> list[Computed]:
        return [Computed(first, rows) for first, rows in self._prompts.finish()]
