"""transformers' `sdpa` for several queries over the keys of few heads. Knows tensors; knows no layer, no lanes.

Where several query heads share a key's head, transformers repeats the keys and values for a pass of more than one token
and a mask: a copy of all that the cache holds, in each layer and each step. The same is computed without it if the
query heads of a key are queries of one head. That is done inside `packed`, and there only; whoever else runs a model in
this process gets transformers' own.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

__all__ = ["packed"]

_MORE = ("position_bias", "softcap", "cache")
"""What transformers' function computes besides."""


class _Inside(threading.local):
    depth = 0


_inside = _Inside()


@contextmanager
def packed() -> Iterator[None]:
    """In this thread, `sdpa` copies no keys. Somebody else's `sdpa` stays as it is."""
    if AttentionInterface()["sdpa"] is sdpa_attention_forward:
        AttentionInterface.register("sdpa", _attention)
    _inside.depth += 1
    try:
        yield
    finally:
        _inside.depth -= 1


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    (batch, heads, queries, dim), kv_heads = query.shape, key.shape[1]
    plain = _inside.depth == 0 or heads == kv_heads or queries == 1 or any(how.get(name) is not None for name in _MORE)
    if plain or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)  # type: ignore[no-any-return]
    found = F.scaled_dot_product_attention(
        query.reshape(batch, kv_heads, -1, dim),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, heads // kv_heads, 1),
        scale=how.get("scaling"),
    )
    return found.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None
