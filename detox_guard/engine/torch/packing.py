"""Linear layers in oneDNN's blocked weight layout. Knows `nn.Linear` on a CPU in fp32; knows nothing of decoding.

Left as they are: rounded weights, a LoRA adapter's small matrices, and all of a model that accelerate moves about.

Decoding two rows instead of one costs nearly nothing when the weights are read once for both. MKL's GEMM for 2-8 rows
does not do that (it costs about twice a matrix-vector product); oneDNN's with a weight laid out beforehand does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["can_pack", "pack_linears"]

_TOLERANCE = 1e-4


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, its weight held only in oneDNN's layout. `[..., in]` to `[..., out]`, fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy `[out, in]`, for the few models that look at a layer's weight; slow."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out


def can_pack(model: nn.Module) -> bool:
    """Whether `pack_linears` would work on this model, device, dtype and build of torch; tried out, not guessed."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (available and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    linears = [linear for _, _, linear in _linears(model)]
    if (
        not linears
        or hasattr(model, "_hf_hook")
        or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters())
    ):
        return False
    probe = nn.Linear(24, 40)
    x = torch.linspace(-1, 1, 3 * 24).view(3, 24)
    try:
        with torch.no_grad():
            return bool(torch.allclose(PackedLinear(probe)(x), probe(x), atol=_TOLERANCE))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack_linears(model: nn.Module) -> int:
    """Replace every `nn.Linear` of `model` by a `PackedLinear`, in place; returns how many.

    A weight that nobody else holds (every layer's; not a head tied to the embeddings) is freed as it is packed, so the
    peak is one layer above the model. Numbers change in the last bits only.
    """
    count = 0
    with torch.no_grad():
        for parent, name, linear in list(_linears(model)):
            setattr(parent, name, PackedLinear(linear))
            count += 1
    return count


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            # A rounded weight is a tensor class of its own. PEFT keeps its matrices in dicts, and reads their weights.
            if (
                type(child) is nn.Linear
                and type(child.weight) is nn.Parameter
                and not isinstance(parent, nn.ModuleDict)
            ):
                yield parent, name, child
