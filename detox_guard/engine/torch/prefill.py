"""Running the backbone: prompts into K/V. Knows no steps, no sampling.

Position ids are explicit everywhere. What the row of a view reads is told in `detoxifiers.base`. The tokens of a
`front` view are a K/V prefix that was computed once: causal attention makes it independent of what follows. A `reply`
view reads the prompt's K/V where the generator's row has them, and holds only what stands behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from detox_guard.detoxifiers.base import EmbeddingPrefix, ids_behind, own_contexts
from detox_guard.engine.base import shared
from detox_guard.engine.torch.cache import OwnLayer
from detox_guard.errors import StepError
from detox_guard.models.checks import attention_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.base import PromptIds
    from detox_guard.engine.torch.held import LayerKV
    from detox_guard.models.backbone import Backbone

Seen = Callable[[int | None], "Tensor"]
"""The mask `[rows, 1, q, slots]` bool of layers that see so many tokens back, or all (None)."""
Known = tuple["PromptIds", "Sequence[LayerKV]"]
"""A prompt that was computed, and each row's K/V by layers, of a `reply` view what stands behind the context."""

__all__ = ["Forward", "Prefill"]


class Forward:
    """The backbone and its views, ready to run. All methods expect `torch.inference_mode`."""

    def __init__(self, backbone: Backbone, views: Sequence[View]) -> None:
        self.model: Any = backbone.model
        self.device = backbone.device
        self.pad_id = backbone.pad_token_id
        self.views = [
            replace(view, embeddings=view.embeddings.to(backbone.device, backbone.dtype))
            if isinstance(view, EmbeddingPrefix)
            else view
            for view in views
        ]
        self._windows = dict(backbone.running.windows) or {"": None}
        # `eager` attention adds its mask to the scores; `sdpa` takes a boolean one.
        self._additive = attention_of(self.model.config) == "eager"
        keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._keeps = keeps
        self.prefixes: dict[int, LayerKV] = {}
        with torch.inference_mode():
            for index, view in enumerate(self.views):
                if view.place == "front":
                    cache = DynamicCache()
                    positions = torch.arange(len(view), device=self.device).unsqueeze(0)
                    if isinstance(view, EmbeddingPrefix):
                        self.run(cache, positions, embeds=view.embeddings.unsqueeze(0))
                    else:
                        self.run(cache, positions, ids=torch.tensor([view.ids], device=self.device))
                    self.prefixes[index] = layers_of(cache)

    def run(
        self,
        cache: object,
        positions: Tensor,
        *,
        ids: Tensor | None = None,
        embeds: Tensor | None = None,
        seen: Seen | None = None,
        last: int = 1,
    ) -> Tensor:
        """One forward pass; float32 logits `[rows, last, vocab]` of the last columns. Without `seen` there is one row,
        and the model makes its own masks."""
        out = self.model(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=None if seen is None else self._mask(seen),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": last} if self._keeps else {}),
        )
        # A copy, so that callers may write to it and the full-width logits are freed.
        return out.logits[:, -last:].to(torch.float32, copy=True)  # type: ignore[no-any-return]

    def _mask(self, seen: Seen) -> Tensor | dict[str, Tensor]:
        """What the model takes: one mask for all layers, or one for each kind of layer."""
        masks = {kind: self._form(seen(window)) for kind, window in self._windows.items()}
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _form(self, mask: Tensor) -> Tensor:
        if self._additive:
            dtype = next(self.model.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask.to(self.device)


class Prefill:
    """The prompts of a few requests on their way into K/V, `advance` by `advance`.

    Several prompts are padded on the left and computed together; they must fit one chunk. One prompt may be longer, and
    takes a chunk a call.

    `bases[i]` is another prompt and the K/V of its rows, as `finish` gives them. A row of prompt i that begins like the
    other's starts with a copy of that part.
    """

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[PromptIds],
        bases: Sequence[Known | None] = (),
    ) -> None:
        self.forward = forward
        self.prompts = prompts
        self.done_tokens = 0
        # Rows of the padded batch: (request, view), view -1 being the generator; and what each of them reads.
        contexts: dict[tuple[int, int], Sequence[int]] = {(i, -1): prompt.ids for i, prompt in enumerate(prompts)}
        for i, prompt in enumerate(prompts):
            if prompt.steered:
                contexts |= {(i, v): prompt.ids for v in forward.prefixes}
                contexts |= {(i, v): own for v, own in own_contexts(forward.views, prompt.contexts).items()}
        self.rows = list(contexts)
        # What each row starts with, and what it has to read behind that.
        self._held = [self._start_of(*row, bases[row[0]] if bases else None) for row in self.rows]
        self._contexts = [ids[kept:] for ids, (_, kept) in zip(contexts.values(), self._held, strict=True)]
        self.total = max(map(len, self._contexts))
        self._prefix = max(_length(layers) for layers, _ in self._held)
        self._cache = DynamicCache()
        self._logits: Tensor | None = None
        self._start()

    def _start_of(self, request: int, view: int, base: Known | None) -> tuple[LayerKV, int]:
        """What a row starts with, and how many ids of its context are in that."""
        front = self.forward.prefixes.get(view, [])
        if base is None or view + 1 >= len(base[1]):
            return front, 0
        prompt, (other, rows) = self.prompts[request], base
        mine, its = (own_contexts(self.forward.views, p.contexts) if p.steered else {} for p in (prompt, other))
        ids = mine.get(view, prompt.ids)
        kept = min(shared(tuple(ids), tuple(its.get(view, other.ids))), len(ids) - 1)
        slots = _length(front) + kept
        return [(k[:, :, :slots], v[:, :, :slots]) for k, v in rows[view + 1]], kept

    def _start(self) -> None:
        device = self.forward.device
        self._pads = torch.tensor([self.total - len(context) for context in self._contexts], device=device)
        ids = torch.full((len(self.rows), self.total), self.forward.pad_id, device=device)
        for row, context in enumerate(self._contexts):
            ids[row, self.total - len(context) :] = torch.tensor(context, device=device)
        self._ids = ids
        self._prefix_lens = torch.tensor([_length(layers) for layers, _ in self._held], device=device)
        held = [layers for layers, _ in self._held]
        self._held.clear()
        for layer, (k, v) in enumerate(next(filter(None, held)) if self._prefix else ()):
            keys = k.new_zeros(len(self.rows), k.shape[1], self._prefix, k.shape[3])
            values = v.new_zeros(len(self.rows), v.shape[1], self._prefix, v.shape[3])
            for row, layers in enumerate(held):
                if layers:
                    keys[row, :, self._prefix - layers[layer][0].shape[2] :] = layers[layer][0][0]
                    values[row, :, self._prefix - layers[layer][1].shape[2] :] = layers[layer][1][0]
            self._cache.update(keys, values, layer)

    def advance(self, tokens: int) -> bool:
        """Compute up to `tokens` more columns; True when the prompts are in."""
        lo, hi = self.done_tokens, min(self.total, self.done_tokens + tokens)
        places = _places(self._prefix, self._prefix_lens, self._pads, hi)
        positions, seen = _fed(places, self._prefix + lo)
        self._logits = self.forward.run(self._cache, positions, ids=self._ids[:, lo:hi], seen=seen)[:, 0]
        self.done_tokens = hi
        return hi == self.total

    def finish(self) -> list[tuple[Tensor, list[LayerKV]]]:
        """For each request: logits `[1 + views, vocab]` (1 row if not steered) for its first token, each row's K/V, of
        a `reply` view only what it has behind the context."""
        if self._logits is None or self.done_tokens < self.total:
            raise StepError("prefill finished before its prompts were in")
        layers = layers_of(self._cache)
        logits: dict[tuple[int, int], Tensor] = {}
        kv: dict[tuple[int, int], LayerKV] = {}
        for row, key in enumerate(self.rows):
            logits[key] = self._logits[row]
            prefix = int(self._prefix_lens[row])
            first = self._prefix + int(self._pads[row])
            kv[key] = _columns(layers, row, self._prefix, prefix, first)
        asked = [i for i, prompt in enumerate(self.prompts) if prompt.steered]
        for v, view in enumerate(self.forward.views):
            if view.place == "reply" and asked:
                self._append(v, asked, logits, kv)
        return [
            (
                torch.stack([logits[i, v] for v in self._views_of(prompt)]),
                [kv[i, v] for v in self._views_of(prompt)],
            )
            for i, prompt in enumerate(self.prompts)
        ]

    def _views_of(self, prompt: PromptIds) -> range:
        return range(-1, len(self.forward.views) if prompt.steered else 0)

    def _append(
        self, v: int, asked: list[int], logits: dict[tuple[int, int], Tensor], kv: dict[tuple[int, int], LayerKV]
    ) -> None:
        """A `reply` view: its tokens behind the context that the generator's row already computed."""
        view, device = self.forward.views[v], self.forward.device
        lengths = torch.tensor([len(self.prompts[i].ids) for i in asked], device=device)
        if isinstance(view, EmbeddingPrefix):
            new = len(view)
            added = torch.full_like(lengths, new)
            inputs: dict[str, Any] = {"embeds": view.embeddings.expand(len(asked), -1, -1)}
        else:
            behind = [ids_behind(view, self.prompts[i].ids) for i in asked]
            new = max(map(len, behind))
            added = torch.tensor([len(ids) for ids in behind], device=device)
            padded = [[self.forward.pad_id] * (new - len(ids)) + list(ids) for ids in behind]
            inputs = {"ids": torch.tensor(padded, device=device)}
        longest = int(lengths.max())
        cache = Cache(
            layers=[
                _BehindLayer(*(_stacked([kv[i, -1][layer][part] for i in asked], longest) for part in (0, 1)))
                for layer in range(len(kv[asked[0], -1]))
            ]
        )
        gap = new - added
        positions, seen = _fed(_places(longest, lengths, gap, new), longest)
        out = self.forward.run(cache, positions, seen=seen, **inputs)
        for row, i in enumerate(asked):
            logits[i, v] = out[row, 0]
            at = slice(row, row + 1), slice(None), slice(int(gap[row]), None)
            kv[i, v] = [(layer.own[0][at], layer.own[1][at]) for layer in cache.layers]


class _BehindLayer(OwnLayer):
    """A layer with keys and values that were there before; what is computed behind them is kept apart, in `own`."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.own = (key_states, value_states)
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2])


def _places(edge: int, before: Tensor, gap: Tensor, new: int) -> Tensor:
    """Each slot's position in its row `[rows, edge + new]`, -1 for padding. What a row had before, so many slots, ends
    at `edge`; so many slots behind it are padding again."""
    slots = torch.arange(edge + new, device=before.device)
    place = slots - (edge - before).unsqueeze(-1)
    gap = gap.unsqueeze(-1)
    return torch.where(slots < edge, place, torch.where(slots - edge < gap, -1, place - gap)).clamp_min(-1)


def _fed(places: Tensor, first: int) -> tuple[Tensor, Seen]:
    """For the tokens in the slots from `first` on: their positions, and what they see."""
    fed = places[:, first:]

    def seen(window: int | None) -> Tensor:
        slots = torch.arange(places.shape[1], device=places.device)
        own = slots[first:].unsqueeze(-1)
        nearest = torch.zeros_like(fed) if window is None else (fed - window + 1).clamp_min(0)
        mask = (slots <= own) & (places.unsqueeze(1) >= nearest.unsqueeze(-1))
        # A padding query still attends to itself, or its softmax would be 0/0 and the NaN would spread.
        return (mask | (slots == own)).unsqueeze(1)

    return fed.clamp_min(0), seen


def layers_of(cache: DynamicCache) -> LayerKV:
    """Each layer's `(keys, values)`."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _length(layers: LayerKV) -> int:
    """The slots that a row's K/V hold."""
    return int(layers[0][0].shape[2]) if layers else 0


def _columns(layers: LayerKV, row: int, edge: int, before: int, first: int) -> LayerKV:
    """The valid columns of one row: the last `before` in front of `edge`, then everything from `first`."""
    at = slice(row, row + 1)
    if before == 0 or edge == first:
        return [(k[at, :, first - before :], v[at, :, first - before :]) for k, v in layers]
    return [
        tuple(torch.cat([x[at, :, edge - before : edge], x[at, :, first:]], dim=2) for x in pair)  # type: ignore[misc]
        for pair in layers
    ]


def _stacked(rows: Sequence[Tensor], length: int) -> Tensor:
    """Rows `[1, heads, slots, dim]` in one tensor, each with zeros on the left up to `length` slots."""
    if len(rows) == 1:
        return rows[0]  # no copy of a long prompt
    return torch.cat([torch.nn.functional.pad(x, (0, 0, length - x.shape[2], 0)) for x in rows])
