"""The runner over torch and transformers. Knows how prefill, rows and packed weights go together; knows no requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from detox_guard.detoxifiers.base import most_beside
from detox_guard.engine.runner import Computed, RunnerLimits
from detox_guard.engine.torch.cache import RowCache
from detox_guard.engine.torch.graphs import recorder_for
from detox_guard.engine.torch.packing import can_pack, pack_linears
from detox_guard.engine.torch.prefill import Forward, Prefill
from detox_guard.engine.torch.solo_runner import SoloRunner
from detox_guard.engine.torch.static import static_step
from detox_guard.engine.torch.static_rows import StaticRows
from detox_guard.models.quantization import INT4

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.base import Bounds, PromptIds
    from detox_guard.engine.runner import Base, Row, Runner, Saved
    from detox_guard.engine.torch.cache import LayerKV
    from detox_guard.models.backbone import Backbone

__all__ = ["TorchRunner", "torch_runner"]

AT_ONCE = 8
"""Tokens of a step that cost little more than one a row."""


def torch_runner(backbone: Backbone, views: Sequence[View], bounds: Bounds) -> Runner:
    """The runner that is exact for this backbone."""
    return (TorchRunner if backbone.running.layout == "padded" else SoloRunner)(backbone, views, bounds)


class TorchRunner:
    """Runs a backbone and its views (a `Runner`); `bounds.pack_weights` packs its linear layers in place."""

    def __init__(self, backbone: Backbone, views: Sequence[View], bounds: Bounds) -> None:
        if bounds.pack_weights and can_pack(backbone.model):
            pack_linears(backbone.model, smallest=backbone.quantization == INT4)
        self._forward = Forward(backbone, views)
        self.device: torch.device = self._forward.device
        with torch.inference_mode():
            step = None if backbone.spread else static_step(backbone.model)
        room = (bounds.max_rows, bounds.max_cached_slots)
        recorder = recorder_for(self.device) if bounds.cuda_graphs else None
        self._cache: RowCache | StaticRows = (
            RowCache(backbone.num_layers, *room)
            if step is None
            else StaticRows(step, self.device, backbone.dtype, *room, recorder)
        )
        self.weights = tuple(view.weight for view in views)
        self._beside = most_beside(views)
        self.limits = RunnerLimits(
            backbone.vocab_size,
            backbone.max_positions,
            frozenset({"embeddings", "tokens"}),
            continues=True,
            at_once=AT_ONCE,
        )

    @property
    def rows(self) -> int:
        return len(self._cache.rows)

    def slots(self, prompt: PromptIds) -> int:
        return prompt.slots(self._beside)

    def begin(self, prompts: Sequence[PromptIds], bases: Sequence[Base | None] = ()) -> _Prefill:
        known = [
            None if base is None else (base.prompt, [saved.layers for saved in base.rows if isinstance(saved, _Saved)])
            for base in bases
        ]
        return _Prefill(Prefill(self._forward, prompts, known))

    def join(self, saved: Saved) -> Row:
        assert isinstance(saved, _Saved)
        return self._cache.add(saved.layers)

    def save(self, row: Row) -> Saved:
        return _Saved(self._cache.copy(row))

    def leave(self, row: Row) -> None:
        self._cache.remove(row)

    def rewind(self, row: Row, slots: int) -> None:
        self._cache.rewind(row, slots)

    def decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        if isinstance(self._cache, StaticRows):
            return self._cache.decode(tokens)
        return self._forward.decode(self._cache, tokens)

    def clear(self) -> None:
        self._cache.clear()

    def close(self) -> None:
        self._cache.clear()


@dataclass(frozen=True, eq=False)
class _Saved:
    """Copies of a row's keys and values."""

    layers: LayerKV

    @property
    def slots(self) -> int:
        return int(self.layers[0][0].shape[2])


class _Prefill:
    """A `Prefill` as the scheduler knows it. A pass of torch cannot be broken off, so nobody is asked whether to."""

    def __init__(self, prompts: Prefill) -> None:
        self._prompts = prompts

    @property
    def rows(self) -> int:
        return len(self._prompts.rows)

    @property
    def left(self) -> int:
        return self._prompts.total - self._prompts.done_tokens

    def advance(self, columns: int, given_up: Callable[[], bool]) -> bool:
        return self._prompts.advance(columns)

    def finish(self) -> list[Computed]:
        # Copies: what `finish` gives are views into tensors of the whole group.
        return [
            Computed(first.clone(), [_Saved([(k.clone(), v.clone()) for k, v in layers]) for layers in rows])
            for first, rows in self._prompts.finish()
        ]
