"""Running a backbone that makes its own masks: one row's tokens behind its past, or one token a row. Knows no requests.

Used where padding and hand-made masks would not be exact: chunks, recurrences, ALiBi, caches of other kinds.
Rows that can be batched are (a 2-D mask says what is padding; each model turns it into masks of its own); where that is
not exact either, each row has a pass of its own.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from detox_guard.detoxifiers.base import EmbeddingPrefix
from detox_guard.engine.torch.states import Past, empty_cache
from detox_guard.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.torch.states import StateCache
    from detox_guard.models.backbone import Backbone

__all__ = ["Reader"]

_CACHES = ("past_key_values", "cache_params")


class Reader:
    """A backbone and its views. All methods expect `torch.inference_mode`."""

    def __init__(self, backbone: Backbone, views: Sequence[View]) -> None:
        self.model: Any = backbone.model
        self.device = backbone.device
        running = backbone.running
        self.layout, self.stepwise = running.layout, running.stepwise
        self._embeds, self._first = running.takes_embeddings, running.first_position
        self.views = [
            replace(view, embeddings=view.embeddings.to(backbone.device, backbone.dtype))
            if isinstance(view, EmbeddingPrefix)
            else view
            for view in views
        ]
        takes = inspect.signature(self.model.forward).parameters
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._positions = "position_ids" in takes
        self._name = next((name for name in _CACHES if name in takes), "")
        self.pasts: dict[int, Past] = {}
        """What the row of each view in front reads before any prompt."""
        with torch.inference_mode():
            for index, view in enumerate(self.views):
                if view.place == "front":
                    self.pasts[index] = self.empty()
                    self.read(self.pasts[index], view.embeddings if isinstance(view, EmbeddingPrefix) else view.ids)

    def empty(self) -> Past:
        """The past of a row that has read nothing."""
        # Where rows are alone, the model makes the cache that it wants.
        return Past(empty_cache(self.model.config) if self.layout == "rows" else None)

    def read(self, past: Past, what: Sequence[int] | Tensor) -> Tensor:
        """Read token ids, or embeddings `[n, hidden]`, behind `past`, which is longer afterwards.

        Float32 logits `[1, vocab]` of the last of them.
        """
        if self.stepwise and past.length and len(what) > 1:
            for i in range(len(what)):
                logits = self.read(past, what[i : i + 1])
            return logits
        inputs: dict[str, Any] = {}
        if isinstance(what, torch.Tensor):
            inputs["inputs_embeds"] = what.unsqueeze(0).clone()  # some models scale in place what they are given
        else:
            inputs["input_ids"] = torch.tensor([list(what)], device=self.device)
        count = len(what)
        if self.layout == "recompute":
            ((name, new),) = inputs.items()
            if name == "input_ids" and self._embeds:
                name, new = "inputs_embeds", self.model.get_input_embeddings()(new)
            past.cache = new if past.cache is None else torch.cat([past.cache, new], dim=1)
            inputs = {name: past.cache.clone(), "use_cache": False}
            begin = 0
        else:
            begin = past.length
            inputs |= {self._name: past.cache, "use_cache": True}
        if self._positions:
            inputs["position_ids"] = self._place(range(begin, past.length + count)).unsqueeze(0)
        out = self.model(**inputs, **self._extra)
        if self.layout == "alone":
            past.cache = out[self._name]
        past.length += count
        return out.logits[:, -1].to(torch.float32, copy=True)  # type: ignore[no-any-return]

    def decode(self, cache: StateCache, tokens: Sequence[int]) -> Tensor:
        """Feed `tokens[i]` to row i of the batch; logits `[rows, vocab]`. Every row is one slot longer afterwards."""
        if len(tokens) != len(cache.rows):
            raise StepError(f"{len(tokens)} tokens for {len(cache.rows)} rows")
        mask = cache.open_slot()
        inputs: dict[str, Any] = {self._name: cache, "use_cache": True}
        if cache.has_slots:
            inputs["attention_mask"] = mask.to(self.device, torch.long)
        if self._positions:
            inputs["position_ids"] = self._place([row.length for row in cache.rows]).unsqueeze(1)
        ids = torch.tensor(tokens, device=self.device).unsqueeze(-1)
        logits = self.model(input_ids=ids, **inputs, **self._extra).logits[:, -1].to(torch.float32, copy=True)
        cache.commit(tokens)
        return logits  # type: ignore[no-any-return]

    def _place(self, slots: Sequence[int]) -> Tensor:
        """The positions of these slots of a row."""
        return torch.tensor([slot + self._first for slot in slots], device=self.device)
