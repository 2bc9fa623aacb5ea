"""What kinds of model can be steered. Knows configs and one trial forward pass; loads nothing.

Steering needs a decoder-only text model in which no token sees a later one. Each thing else is refused with its reason.
How a model that is served can be run, `Layout`, is told from its config and its class too.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Literal

from detox_guard.errors import BackboneError, UnsupportedBackboneError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "CONFIG_FILE",
    "NO_SOFT_PROMPT",
    "STEPWISE",
    "Layout",
    "causal_class",
    "check_config",
    "layout_of",
    "learned_positions",
    "max_positions",
    "probe",
    "takes_embeddings",
]

Layout = Literal["padded", "rows", "alone", "state", "recompute"]
"""How a model is run. padded: prompts padded and computed together, our masks, one pass for all rows. rows: each prompt
alone, then one pass for all rows, the model's own masks. alone: a pass a row, its own cache. state: a pass a row, which
hands on a state of the model's own kind. recompute: no cache, so each step reads everything again."""
_ROW_LAYERS = {
    "DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer", "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer",
}  # fmt: skip
"""transformers' kinds of cache layer that a batch of rows can hold."""
_BY_KIND: dict[str, Layout] = {"llama4": "alone", "llama4_text": "alone"}
"""Types whose forward belies what their config says. Llama 4 scales its queries by the length of the cache."""
STEPWISE = frozenset({"mamba", "falcon_mamba", "jamba", "zamba"})
"""Types whose first recurrence forgets its state where more than one token follows it (a scan without a beginning)."""

CONFIG_FILE = "adapter_config.json"
"""Of every PEFT adapter."""
NO_SOFT_PROMPT = "Another adapter (LoRA, say) is part of the model: pass its folder as the model."


def causal_class(config: PreTrainedConfig, name: str) -> Any:
    """The class `AutoModelForCausalLM` will build. Raises `UnsupportedBackboneError` if there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedBackboneError(f"{name}: {config.model_type} is no causal language model")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def check_config(config: PreTrainedConfig, cls: Any, name: str) -> None:
    """Refuse what can be told from the config and the class alone, before any weight is read.

    `cls` None: not known yet (remote code); `from_model` checks again with the class.
    Raises `UnsupportedBackboneError`.
    """

    def refuse(reason: str) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(
            f"{name} ({config.model_type}) cannot be steered: {reason}",
            hint="Use a text-only decoder with a key/value cache in every layer (Llama, Qwen, Mistral, GPT-2, …).",
        )

    if config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder; only decoder-only models are served")


def layout_of(config: PreTrainedConfig, cls: Any) -> Layout:
    """How a model of this class can be run without an error in any digit but the last."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    kind = str(config.model_type)
    if kind in _BY_KIND:
        return _BY_KIND[kind]
    text = config.get_text_config(decoder=True)
    takes = inspect.signature(cls.forward).parameters
    if "past_key_values" not in takes and "cache_params" not in takes:
        return "recompute"
    names = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if not names <= _ROW_LAYERS:
        return "alone"
    own_masks = text is not config or getattr(text, "alibi", False) or "local" in getattr(text, "attention_layers", ())
    if own_masks or "position_ids" not in takes or names != {DynamicLayer.__name__}:
        return "rows"
    return "padded"


def takes_embeddings(config: PreTrainedConfig, cls: Any) -> bool:
    """Whether virtual tokens can be fed: not where every layer looks its token ids up once more."""
    if getattr(config.get_text_config(decoder=True), "hidden_size_per_layer_input", None):
        return False
    return cls is None or "inputs_embeds" in inspect.signature(cls.forward).parameters


def probe(model: PreTrainedModel, name: str, device: torch.device) -> int | None:
    """One pass over `[[0, 1], [0, 2]]`: finite, causal, cached? Returns the smallest attention window, if any.

    `device` is where its inputs go.

    Raises `UnsupportedBackboneError`, or `BackboneError` for weights that give no numbers.
    """
    import torch

    def refuse(reason: str) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(f"{name} ({type(model).__name__}) cannot be steered: {reason}")

    config = model.config.get_text_config(decoder=True)
    takes = inspect.signature(model.forward).parameters
    ids = torch.tensor([[0, 1], [0, 2]], device=device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if takes_embeddings(model.config, type(model)):
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    if "position_ids" in takes:
        inputs["position_ids"] = torch.tensor([[0, 1], [0, 1]], device=device)
    try:
        with torch.inference_mode():
            out = model(**inputs)
    except Exception as error:  # kernels of rounded weights assert, too
        raise BackboneError(f"{name}: a trial pass over two tokens failed: {error}") from error
    if out.logits.shape[-1] != config.vocab_size:
        raise BackboneError(
            f"{name}: {out.logits.shape[-1]} logits for a vocabulary of {config.vocab_size} in config.json"
        )
    if not torch.isfinite(out.logits).all():
        raise BackboneError(
            f"{name}: the logits are not finite in {model.dtype}",
            hint='The weights are damaged, or overflow in this dtype: try dtype="float32".',
        )
    if not torch.allclose(out.logits[0, 0], out.logits[1, 0], rtol=1e-2, atol=1e-2):
        raise refuse("a later token changes what an earlier one sees, so it is not causal")
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's own way to say it
        windows.append(int(config.window_size))
    return min((int(window) for window in windows if window), default=None)


def max_positions(config: PreTrainedConfig, name: str) -> int | None:
    """The largest number of positions that are computed alike, whatever else is in the batch; None if unbounded.

    LongRoPE (Ding et al. 2024) turns all positions of a pass otherwise once one of them lies past the length of its
    training, cached ones not: so it is served up to that length. Raises `UnsupportedBackboneError` if that is unknown.
    """
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if one.get("rope_type", one.get("type")) == "longrope":
            key = "original_max_position_embeddings"
            original = one.get(key) or getattr(config, key, None)
            if not original:
                raise UnsupportedBackboneError(f"{name} cannot be steered: longrope without {key} in config.json")
            most = min(int(most or original), int(original))
    return None if most is None else int(most)


def learned_positions(model: PreTrainedModel) -> bool:
    """Whether an absolute position table (GPT-2's wpe, OPT's embed_positions, …) bounds the positions."""
    from torch import nn

    return any(
        isinstance(module, nn.Embedding) and re.search(r"wpe$|pos", path) is not None
        for path, module in model.named_modules()
    )
