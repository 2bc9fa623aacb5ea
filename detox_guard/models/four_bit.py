"""Weights that lie on a grid of 16 values a group of 32: how it is found, and how a model is rounded to one.

The grid of a group is `scale · (q - 8) + zero` with `q` from 0 to 15. Files of the kind Q4_1 hold nothing else, and a
model that was read from one has these values written out. Knows numbers; knows no kernel that computes with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from detox_guard.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GROUP", "Grid", "grid_of", "is_on_grid", "round_to_grid"]

GROUP = 32
"""Weights of a row that share a scale and a zero."""
_PROBED = 64
"""Rows of a weight that are looked at before all of it is."""
_ROUNDING = 2.0**-8
"""Relative error that a bfloat16 number may have, doubled."""


class Grid(NamedTuple):
    """A weight `[out, in]` in 4 bits."""

    q: torch.Tensor
    """`[out, in]` int32, 0 to 15."""
    scale: torch.Tensor
    """`[out, in / 32]` bfloat16."""
    zero: torch.Tensor
    """`[out, in / 32]` bfloat16: the value of q = 8."""

    def values(self) -> torch.Tensor:
        """The weight in float32."""
        grouped = (self.q.view(*self.scale.shape, GROUP) - 8) * self.scale.float().unsqueeze(-1)
        return (grouped + self.zero.float().unsqueeze(-1)).view_as(self.q)


def grid_of(weight: torch.Tensor) -> Grid:
    """The grid from the least to the greatest of each group, and where each value of `[out, in]` is nearest to on it.

    Exact up to rounding where the values came from such a grid: a group of Q4_1 has its least value at 0 and its
    greatest at 15. `in` is a multiple of 32.
    """
    w = weight.detach().float().view(len(weight), -1, GROUP)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    step = (high - low) / 15
    q = torch.where(step > 0, (w - low) / step, 0).round()
    # The line through all 32 points: it averages out how each of them was rounded.
    middle, mean = q.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
    spread = (q - middle).square().sum(-1, keepdim=True)
    scale = torch.where(spread > 0, ((q - middle) * (w - mean)).sum(-1, keepdim=True) / spread, 0)
    zero = mean + scale * (8 - middle)
    return Grid(q.to(torch.int32).view(weight.shape), scale[..., 0].bfloat16(), zero[..., 0].bfloat16())


def is_on_grid(weight: torch.Tensor) -> bool:
    """Whether all of a weight `[out, in]` is what its grid restates, up to rounding in bfloat16."""
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        return False
    return _fits(weight[:_PROBED]) and _fits(weight)


def _fits(weight: torch.Tensor) -> bool:
    grid = grid_of(weight)
    w = weight.detach().float().view(*grid.scale.shape, GROUP)
    error = (grid.values().view_as(w) - w).abs().amax(-1)
    # The line is as exact as the largest values that it goes through.
    most = 8 * grid.scale.float().abs() + grid.zero.float().abs() + w.abs().amax(-1)
    return bool((error <= most * _ROUNDING).all())


def round_to_grid(model: PreTrainedModel) -> int:
    """Round the weights of every linear layer but the head, in place; how many were. Their number type stays.

    The small matrices of an adapter stay as they are. Raises `BackboneError` for a model without such layers.
    """
    head = model.get_output_embeddings()
    count = 0
    for parent in model.modules():
        # PEFT keeps its matrices in dicts.
        for module in () if isinstance(parent, nn.ModuleDict) else parent.children():
            if type(module) is nn.Linear and module is not head and module.in_features % GROUP == 0:
                with torch.no_grad():
                    module.weight.copy_(grid_of(module.weight).values())
                count += 1
    if not count:
        raise BackboneError(f"{model.config.model_type}: no layer that int4 could round", hint="Load it without int4.")
    return count
