"""The runner over torch and transformers. Knows how prefill, rows and packed weights go together; knows no requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detox_guard.detoxifiers.base import EmbeddingPrefix, lanes_of, most_beside
from detox_guard.engine.runner import Computed, Room, RunnerLimits
from detox_guard.engine.torch.forward_step import ForwardStep
from detox_guard.engine.torch.graphs import recorder_for
from detox_guard.engine.torch.held import Held
from detox_guard.engine.torch.lanes import Lanes
from detox_guard.engine.torch.packing import can_pack, pack_linears
from detox_guard.engine.torch.prefill import Forward, Prefill
from detox_guard.engine.torch.solo_runner import SoloRunner
from detox_guard.engine.torch.static import static_step
from detox_guard.errors import StepError, UnsupportedBackboneError
from detox_guard.models.quantization import INT4

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.base import Bounds, PromptIds
    from detox_guard.engine.runner import Base, Row, Runner, Saved
    from detox_guard.engine.torch.held import LayerKV
    from detox_guard.models.backbone import Backbone

__all__ = ["TorchRunner", "torch_runner"]

AT_ONCE = 8
"""Tokens of a step that cost little more than one a row."""


def torch_runner(backbone: Backbone, views: Sequence[View], bounds: Bounds) -> Runner:
    """The runner that is exact for this backbone. Raises `UnsupportedBackboneError` for a view that it cannot take."""
    if not backbone.running.takes_embeddings and any(isinstance(view, EmbeddingPrefix) for view in views):
        raise UnsupportedBackboneError(
            f"{backbone.id}: every layer looks its token ids up, and virtual tokens have none",
            hint="Steer it by a text instead of a soft prompt.",
        )
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
        # Only the short step can be recorded: it does nothing but arithmetic on its input.
        recorder = recorder_for(self.device) if bounds.cuda_graphs and step is not None else None
        self._lanes = Lanes(
            step or ForwardStep(self._forward), self.device, bounds.max_rows, bounds.max_cached_slots, recorder
        )
        self.weights = tuple(view.weight for view in views)
        self._views = views
        self.limits = RunnerLimits(
            backbone.vocab_size,
            backbone.max_positions,
            backbone.running.view_kinds,
            continues=True,
            at_once=AT_ONCE,
        )

    @property
    def rows(self) -> int:
        return len(self._lanes.rows)

    def slots(self, prompt: PromptIds) -> int:
        return prompt.slots(most_beside(self._views))

    def room(self, prompt: PromptIds, max_new_tokens: int) -> Room:
        views = self._views if prompt.steered else ()
        lanes = lanes_of(views, len(prompt.ids), [len(one) for one in prompt.contexts], max_new_tokens)
        return Room(len(lanes), max(lanes))

    def begin(self, prompts: Sequence[PromptIds], bases: Sequence[Base | None] = ()) -> _Prefill:
        known = [
            None if base is None else (base.prompt, [saved.layers for saved in base.rows if isinstance(saved, Held)])
            for base in bases
        ]
        return _Prefill(Prefill(self._forward, prompts, known), self._views)

    def join(self, saved: Sequence[Saved], new: int) -> list[Row]:
        held = [one for one in saved if isinstance(one, Held)]
        if len(held) != len(saved):
            raise StepError("what was saved is of another runner")
        return self._lanes.join(held, new)

    def save(self, rows: Sequence[Row]) -> list[Held]:
        return self._lanes.save(rows)

    def leave(self, row: Row) -> None:
        self._lanes.remove(row)

    def rewind(self, row: Row, slots: int) -> None:
        self._lanes.rewind(row, slots)

    def decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        return self._lanes.decode(tokens)

    def clear(self) -> None:
        self._lanes.clear()

    def close(self) -> None:
        self._lanes.clear()


class _Prefill:
    """A `Prefill` as the scheduler knows it. A pass of torch cannot be broken off, so nobody is asked whether to."""

    def __init__(self, prompts: Prefill, views: Sequence[View]) -> None:
        self._prompts, self._views = prompts, views

    @property
    def rows(self) -> int:
        return len(self._prompts.rows)

    @property
    def left(self) -> int:
        return self._prompts.total - self._prompts.done_tokens

    def advance(self, columns: int, given_up: Callable[[], bool]) -> bool:
        return self._prompts.advance(columns)

    def finish(self) -> list[Computed]:
        return [Computed(first.clone(), self._held(rows)) for first, rows in self._prompts.finish()]

    def _held(self, rows: Sequence[LayerKV]) -> list[Held]:
        own = [[(_own(k), _own(v)) for k, v in layers] for layers in rows]
        generator = Held(own[0])
        views = self._views if len(own) > 1 else ()
        return [
            generator,
            *(
                Held(layers, generator, generator.slots) if view.place == "reply" else Held(layers)
                for layers, view in zip(own[1:], views, strict=True)
            ),
        ]


def _own(x: Tensor) -> Tensor:
    """A copy of a view into the tensor of a whole group; what is nobody else's stays as it is."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()
