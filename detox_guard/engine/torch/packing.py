"""Linear layers in the layouts that decode fastest on a CPU. Knows `nn.Linear` in fp32 and bf16; knows no decoding.

Left as they are: rounded weights, a LoRA adapter's small matrices, and all of a model that accelerate moves about.

Decoding two rows instead of one costs nearly nothing when the weights are read once for both. The plain kernels do not
do that for 2-8 rows, and in bf16 read a weight at a third of the memory's speed; oneDNN's with a weight laid out
beforehand do better. Layers in bf16 whose values are 4-bit numbers written out are held in 4 bits besides (`int4`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from detox_guard.engine.torch.int4 import Int4Linear, can_hold

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["can_pack", "pack_linears"]

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""By the number types that can be packed."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, its weight held only in oneDNN's layout. `[..., in]` to `[..., out]`."""

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
    dtypes = {linear.weight.dtype for _, _, linear in _linears(model)}
    if not dtypes or hasattr(model, "_hf_hook") or any(p.device.type != "cpu" for p in model.parameters()):
        return False
    return all(_packs(dtype) for dtype in dtypes)


def _packs(dtype: torch.dtype) -> bool:
    """Whether a packed layer of this number type computes what a plain one does."""
    if dtype not in _TOLERANCE:
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    probe = nn.Linear(24, 40, dtype=dtype)
    x = torch.linspace(-1, 1, 3 * 24, dtype=dtype).view(3, 24)
    try:
        with torch.no_grad():
            return bool(torch.allclose(PackedLinear(probe)(x), probe(x), atol=_TOLERANCE[dtype]))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack_linears(model: nn.Module, *, smallest: bool = False) -> int:
    """Replace every `nn.Linear` of `model` by a packed layer, in place; returns how many.

    A weight that nobody else holds (every layer's; not a head tied to the embeddings) is freed as it is packed, so the
    peak is one layer above the model. A layer in 4 bits keeps its bf16 weights for passes of many rows, which makes it
    a third larger; with `smallest` it does not, which makes it three times smaller, and long prompts slower. In fp32
    numbers change in the last bits only; in bf16 they are rounded otherwise.
    """
    count = 0
    with torch.no_grad():
        for parent, name, linear in list(_linears(model)):
            setattr(parent, name, _packed(linear, smallest))
            count += 1
    return count


def _packed(linear: nn.Linear, smallest: bool) -> nn.Module:
    if not can_hold(linear):
        return PackedLinear(linear)
    return Int4Linear(linear, None if smallest else PackedLinear(linear))


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
