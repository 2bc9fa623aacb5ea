"""Rounded weights: what a short name stands for, and what a model says of its own. Loads nothing.

Rounding itself is the work of torchao, bitsandbytes and the like, through transformers; that to int4 is `four_bit`'s.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from typing import TYPE_CHECKING, Any

from detox_guard.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["INT4", "as_config", "is_quantized", "need", "quantization_of"]

INT4 = "int4-g32"
"""How a model says that it was rounded by `four_bit`."""


def as_config(asked: Any, dtype: torch.dtype | str) -> Any:
    """What `LoadOptions.quantization_config` means, as transformers takes it; `dtype` is what is computed in.

    `int8`, `fp8`: torchao, weights only, so that a row does not depend on its neighbours. `nf4`: bitsandbytes, 4 bit.
    `bnb-int8`: bitsandbytes' LLM.int8. Raises `BackboneError` where the package is not installed.
    """
    if not isinstance(asked, str):
        return asked
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if asked in ("int8", "fp8"):
        need("torchao", f"quantization_config={asked!r}")
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if asked == "int8" else Float8WeightOnlyConfig())
    need("bitsandbytes", f"quantization_config={asked!r}")
    if asked == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = {} if dtype == "auto" else {"bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **compute)


def need(package: str, what: str) -> None:
    """Raise `BackboneError` unless `package` is installed; `what` asked for it."""
    if importlib.util.find_spec(package) is None:
        raise BackboneError(f"{what} needs {package}, which is not installed", hint=f"pip install {package}")


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the files hold quantized weights already."""
    return getattr(config, "quantization_config", None) is not None


def quantization_of(config: PreTrainedConfig) -> str | None:
    """Method, kind and a digest of all settings, such as `torchao-Int8WeightOnlyConfig-1f0c52aa`; None if not rounded.

    Equal for a model that was rounded while it was loaded and for one that was saved rounded.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    told: dict[str, Any] = dict(found) if isinstance(found, dict) else found.to_dict()
    method = getattr(told.get("quant_method"), "value", told.get("quant_method"))
    bits = next((told[name] for name in ("bits", "w_bit", "num_bits", "nbits") if told.get(name)), None)
    kind = f"{bits}bit" if bits else ""
    if told.get("load_in_8bit") or told.get("_load_in_8bit"):
        kind = "8bit"
    elif told.get("load_in_4bit") or told.get("_load_in_4bit"):
        kind = str(told.get("bnb_4bit_quant_type") or "4bit")
    elif isinstance(rounded := told.get("quant_type"), dict):
        kind = str(rounded.get("default", rounded).get("_type", ""))
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return "-".join(part for part in (str(method), kind, digest) if part)
