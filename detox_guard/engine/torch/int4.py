"""Linear layers that hold their weights in 4 bits, for a few rows at a time. Knows torch's kernel on a CPU in bfloat16.

A decoding step reads every weight once for a few rows, and is as fast as that reading. With many rows arithmetic
counts, which the kernel is slow at.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from detox_guard.models.four_bit import GROUP, Grid, grid_of, is_on_grid

__all__ = ["Int4Linear", "can_hold"]

FEW_ROWS = 24
"""Up to so many rows, 4 bits are faster than packed bfloat16: on AVX512, .53 of the time for 4 and .91 for 24."""
_BLOCK = 16
"""The kernel wants a multiple of so many outputs."""


class Int4Linear(nn.Module):
    """`nn.Linear` for inference in bfloat16. `[..., in]` to `[..., out]`.

    `many`, where it is given, is the same layer in another layout; it takes passes of more than `FEW_ROWS` rows.
    """

    def __init__(self, linear: nn.Linear, many: nn.Module | None) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        grid = grid_of(linear.weight)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(grid.q, 1)
        self._grids = torch.stack([grid.scale.t(), grid.zero.t()], dim=-1).contiguous()
        self.bias = linear.bias
        self.many = many

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy `[out, in]`, for the few models that look at a layer's weight; slow."""
        identity = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self._few(identity).t().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.many is not None and x.numel() > FEW_ROWS * self.in_features:
            out: torch.Tensor = self.many(x)
            return out
        out = self._few(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, GROUP, self._grids)
        return out


def can_hold(linear: nn.Linear) -> bool:
    """Whether this layer loses nothing in 4 bits but rounding in bfloat16, and the kernel takes it."""
    return (
        linear.weight.dtype == torch.bfloat16
        and linear.out_features % _BLOCK == 0
        and has_kernel()
        and is_on_grid(linear.weight)
    )


@cache
def has_kernel() -> bool:
    """Whether this CPU and build of torch have the kernel, and it is right; tried out, not guessed."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False  # elsewhere it exists, written for correctness and not for speed
    q = torch.arange(80 * 64, dtype=torch.int32).mul(7).view(80, 64) % 16
    scale = torch.linspace(0.01, 0.02, 160).view(80, 2).bfloat16()
    grid = Grid(q, scale, scale * 3)
    linear = nn.Linear(64, 80, bias=False, dtype=torch.bfloat16)
    x = torch.linspace(-1, 1, 3 * 64).view(3, 64).bfloat16()
    try:
        with torch.inference_mode():
            linear.weight = nn.Parameter(grid.values().bfloat16(), requires_grad=False)
            return bool(torch.allclose(Int4Linear(linear, None)(x), linear(x), atol=0.05, rtol=0.02))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
