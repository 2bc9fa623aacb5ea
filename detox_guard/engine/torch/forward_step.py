"""A decoding step by transformers' own forward, for models that `static` does not know. Knows lanes; knows no layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache

from detox_guard.engine.torch.attention import packed
from detox_guard.engine.torch.cache import OwnLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.engine.torch.feed import Feed
    from detox_guard.engine.torch.prefill import Forward

__all__ = ["ForwardStep"]


class ForwardStep:
    """A `feed.Step`: each lane is a row of the batch, and the tokens of its rows stand side by side."""

    even = True

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, feed: Feed, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        rows, count = feed.tokens.shape

        def seen(window: int | None) -> Tensor:
            return feed.seen(window).view(*feed.shape, feed.width).unsqueeze(1)

        cache = Cache(layers=[_LaneLayer(feed, k, v) for k, v in zip(keys, values, strict=True)])
        ids, positions = feed.tokens.view(feed.shape), feed.positions.view(feed.shape)
        with packed():
            logits = self._forward.run(cache, positions, ids=ids, seen=seen, last=feed.shape[1])
        return logits.view(rows, count, -1)


class _LaneLayer(OwnLayer):
    """One layer's buffers `[some, heads, some, dim]`, for one step."""

    def __init__(self, feed: Feed, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        self._feed = feed

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        lanes, queries = self._feed.shape
        if key_states.shape[0] != lanes or key_states.shape[2] != queries:
            raise RuntimeError(f"keys of {tuple(key_states.shape)} computed for {lanes} lanes of {queries} tokens")
        at = self._feed.lanes.view(lanes, -1)[:, :1].to(self.keys.device)
        slots = self._feed.slots.view(lanes, queries).to(self.keys.device)
        self.keys[at, :, slots] = key_states.transpose(1, 2)
        self.values[at, :, slots] = value_states.transpose(1, 2)
        return self.keys[:lanes, :, : self._feed.width], self.values[:lanes, :, : self._feed.width]

    def get_seq_length(self) -> int:
        return self._feed.width - self._feed.shape[1]
