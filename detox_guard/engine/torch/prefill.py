"""Running the backbone: prompts into K/V (prefill), and one token a row (decode). Knows no sampling.

Position ids are explicit everywhere. A `front` stream reads `[virtual tokens][prompt][reply]`, its virtual tokens being
a K/V prefix that was computed once (causal attention makes it independent of what follows). A `reply` stream reads
`[prompt][virtual tokens][reply]` and takes the prompt's K/V from the generator's row.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from detox_guard.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.engine.base import StreamSpec
    from detox_guard.engine.torch.cache import RowCache
    from detox_guard.models.backbone import Backbone

LayerKV = list[tuple["Tensor", "Tensor"]]

__all__ = ["Forward", "Prefill"]


class Forward:
    """The backbone and its streams, ready to run. All methods expect `torch.inference_mode`."""

    def __init__(self, backbone: Backbone, streams: Sequence[StreamSpec]) -> None:
        self.model: Any = backbone.model
        self.device = backbone.device
        self.pad_id = backbone.pad_token_id
        self.streams = [
            spec._replace(embeddings=spec.embeddings.to(backbone.device, backbone.dtype)) for spec in streams
        ]
        # `eager` attention adds its mask to the scores; `sdpa` takes a boolean one.
        self._additive = getattr(self.model.config, "_attn_implementation", "sdpa") == "eager"
        keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if keeps else {}
        self.prefixes: dict[int, LayerKV] = {}
        with torch.inference_mode():
            for index, spec in enumerate(self.streams):
                if spec.front:
                    cache = DynamicCache()
                    positions = torch.arange(len(spec.embeddings), device=self.device).unsqueeze(0)
                    self.run(cache, positions, embeds=spec.embeddings.unsqueeze(0))
                    self.prefixes[index] = layers_of(cache)

    def run(
        self,
        cache: object,
        positions: Tensor,
        *,
        ids: Tensor | None = None,
        embeds: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One forward pass; float32 logits `[rows, vocab]` of the last column. `mask` is `[rows, 1, q, slots]` bool."""
        if mask is not None and self._additive:
            dtype = next(self.model.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        out = self.model(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.to(self.device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        # A copy, so that callers may write to it and the full-width logits are freed.
        return out.logits[:, -1].to(torch.float32, copy=True)  # type: ignore[no-any-return]

    def decode(self, cache: RowCache, tokens: Sequence[int]) -> Tensor:
        """Feed `tokens[i]` to row i; logits `[rows, vocab]`. Every row is one slot longer afterwards."""
        if len(tokens) != len(cache.rows):
            raise StepError(f"{len(tokens)} tokens for {len(cache.rows)} rows")
        mask = cache.open_slot()
        ids = torch.tensor(tokens, device=self.device).unsqueeze(-1)
        positions = torch.tensor([[row.length] for row in cache.rows], device=self.device)
        logits = self.run(cache, positions, ids=ids, mask=mask)
        cache.commit_slot()
        return logits


class Prefill:
    """The prompts of a few requests on their way into K/V, `advance` by `advance`.

    `guarded[i]` says whether request i takes stream rows. Several prompts are padded on the left and computed together;
    they must fit one chunk. One prompt may be longer, and takes a chunk a call.
    """

    def __init__(self, forward: Forward, prompts: Sequence[Sequence[int]], guarded: Sequence[bool]) -> None:
        self.forward = forward
        self.prompts = prompts
        self.guarded = guarded
        self.done_tokens = 0
        self.total = max(len(prompt) for prompt in prompts)
        # Rows of the padded batch: (request, stream), stream -1 being the generator.
        self.rows = [(i, -1) for i in range(len(prompts))]
        self.rows += [(i, s) for i, g in enumerate(guarded) if g for s in forward.prefixes]
        self._prefix = max((len(forward.streams[s].embeddings) for _, s in self.rows if s >= 0), default=0)
        self._cache = DynamicCache()
        self._logits: Tensor | None = None
        self._start()

    def _start(self) -> None:
        device = self.forward.device
        self._pads = torch.tensor([self.total - len(self.prompts[i]) for i, _ in self.rows], device=device)
        ids = torch.full((len(self.rows), self.total), self.forward.pad_id, device=device)
        for row, (i, _) in enumerate(self.rows):
            ids[row, self.total - len(self.prompts[i]) :] = torch.tensor(self.prompts[i], device=device)
        self._ids = ids
        self._prefix_lens = torch.tensor(
            [len(self.forward.streams[s].embeddings) if s >= 0 else 0 for _, s in self.rows], device=device
        )
        if not self._prefix:
            return
        some = next(iter(self.forward.prefixes.values()))
        for layer, (k, v) in enumerate(some):
            keys = k.new_zeros(len(self.rows), k.shape[1], self._prefix, k.shape[3])
            values = v.new_zeros(len(self.rows), v.shape[1], self._prefix, v.shape[3])
            for row, (_, s) in enumerate(self.rows):
                if s >= 0:
                    pk, pv = self.forward.prefixes[s][layer]
                    keys[row, :, self._prefix - pk.shape[2] :] = pk[0]
                    values[row, :, self._prefix - pv.shape[2] :] = pv[0]
            self._cache.update(keys, values, layer)

    def advance(self, tokens: int) -> bool:
        """Compute up to `tokens` more columns; True when the prompts are in."""
        lo, hi = self.done_tokens, min(self.total, self.done_tokens + tokens)
        device = self.forward.device
        columns = torch.arange(lo, hi, device=device)
        positions = (self._prefix_lens.unsqueeze(-1) + columns - self._pads.unsqueeze(-1)).clamp_min(0)
        slots = torch.arange(self._prefix + hi, device=device)
        valid = torch.where(
            slots < self._prefix,
            slots >= self._prefix - self._prefix_lens.unsqueeze(-1),
            slots - self._prefix >= self._pads.unsqueeze(-1),
        )
        here = slots == (columns + self._prefix).unsqueeze(-1)
        causal = slots <= (columns + self._prefix).unsqueeze(-1)
        # A padding query still attends to itself, or its softmax would be 0/0 and the NaN would spread.
        mask = (valid.unsqueeze(1) & causal | here).unsqueeze(1)
        self._logits = self.forward.run(self._cache, positions, ids=self._ids[:, lo:hi], mask=mask)
        self.done_tokens = hi
        return hi == self.total

    def finish(self) -> list[tuple[Tensor, list[LayerKV]]]:
        """For each request: logits `[1 + streams, vocab]` (1 row if unguarded) for its first token, each row's K/V."""
        if self._logits is None or self.done_tokens < self.total:
            raise StepError("prefill finished before its prompts were in")
        layers = layers_of(self._cache)
        logits: dict[tuple[int, int], Tensor] = {}
        kv: dict[tuple[int, int], LayerKV] = {}
        for row, key in enumerate(self.rows):
            logits[key] = self._logits[row]
            prefix = int(self._prefix_lens[row])
            first = self._prefix + self.total - len(self.prompts[key[0]])
            kv[key] = [
                (
                    _columns(k[row : row + 1], self._prefix, prefix, first),
                    _columns(v[row : row + 1], self._prefix, prefix, first),
                )
                for k, v in layers
            ]
        reply_streams = [s for s in range(len(self.forward.streams)) if s not in self.forward.prefixes]
        asked = [i for i, g in enumerate(self.guarded) if g]
        for s in reply_streams if asked else ():
            self._append_virtual_tokens(s, asked, logits, kv)
        return [
            (
                torch.stack([logits[i, s] for s in self._streams_of(i)]),
                [kv[i, s] for s in self._streams_of(i)],
            )
            for i in range(len(self.prompts))
        ]

    def _streams_of(self, request: int) -> range:
        return range(-1, len(self.forward.streams) if self.guarded[request] else 0)

    def _append_virtual_tokens(
        self, s: int, asked: list[int], logits: dict[tuple[int, int], Tensor], kv: dict[tuple[int, int], LayerKV]
    ) -> None:
        """A `reply` stream: its virtual tokens behind the context that the generator's row already computed."""
        virtual = self.forward.streams[s].embeddings
        lengths = torch.tensor([len(self.prompts[i]) for i in asked], device=self.forward.device)
        longest, new = int(lengths.max()), len(virtual)
        cache = DynamicCache()
        for layer in range(len(kv[asked[0], -1])):
            keys, values = (torch.cat([_padded(kv[i, -1][layer][part], longest) for i in asked]) for part in (0, 1))
            cache.update(keys, values, layer)
        positions = lengths.unsqueeze(-1) + torch.arange(new, device=lengths.device)
        slots = torch.arange(longest + new, device=lengths.device)
        causal = slots <= longest + torch.arange(new, device=lengths.device).unsqueeze(-1)
        mask = causal & (slots >= longest - lengths.unsqueeze(-1)).unsqueeze(1)
        out = self.forward.run(cache, positions, embeds=virtual.expand(len(asked), -1, -1), mask=mask.unsqueeze(1))
        for row, i in enumerate(asked):
            first = longest - len(self.prompts[i])
            logits[i, s] = out[row]
            kv[i, s] = [(k[row : row + 1, :, first:], v[row : row + 1, :, first:]) for k, v in layers_of(cache)]


def layers_of(cache: DynamicCache) -> LayerKV:
    """Each layer's `(keys, values)`."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _columns(x: Tensor, prefix_slots: int, prefix: int, first: int) -> Tensor:
    """The valid columns of one row: its right-aligned prefix, then everything from `first`."""
    if prefix == 0:
        return x[:, :, first:]
    return torch.cat([x[:, :, prefix_slots - prefix : prefix_slots], x[:, :, first:]], dim=2)


def _padded(x: Tensor, length: int) -> Tensor:
    """Zeros on the left up to `length` slots."""
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[2], 0))
