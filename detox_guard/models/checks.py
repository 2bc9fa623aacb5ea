"""What kinds of model can be steered. Knows configs and one trial forward pass; loads nothing.

Steering needs a decoder-only text model whose every layer keeps plain keys and values, which takes `inputs_embeds` and
explicit `position_ids`, and in which no token sees a later one. Each thing else is refused with its reason.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from detox_guard.errors import BackboneError, UnsupportedBackboneError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "CONFIG_FILE",
    "NO_SOFT_PROMPT",
    "causal_class",
    "check_config",
    "learned_positions",
    "max_positions",
    "probe",
]

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
    from transformers import DynamicCache

    def refuse(reason: str) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(
            f"{name} ({config.model_type}) cannot be steered: {reason}",
            hint="Use a text-only decoder with a key/value cache in every layer (Llama, Qwen, Mistral, GPT-2, …).",
        )

    if config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder; only decoder-only models are served")
    if config.get_text_config(decoder=True) is not config or any(
        getattr(config, part, None) is not None for part in ("vision_config", "audio_config")
    ):
        raise refuse("it is a multimodal wrapper; only its text model alone could be served")
    if getattr(config, "hidden_size_per_layer_input", None):
        raise refuse("its per-layer embeddings need token ids, which virtual tokens do not have")
    if getattr(config, "alibi", False):
        raise refuse("ALiBi takes its distances from the padding mask, not from position ids")
    if getattr(cls, "_is_stateful", False):
        raise refuse("it keeps a recurrent state, not a key/value cache")
    if cls is not None:
        # some forwards swallow unknown arguments, and would then place tokens by the padding mask
        takes = inspect.signature(cls.forward).parameters
        if lacks := {"inputs_embeds", "position_ids", "past_key_values"} - set(takes):
            raise refuse(f"its forward takes no {', '.join(sorted(lacks))}")
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:
        raise refuse("transformers can build no key/value cache from its config") from error
    _check_layers(layers, refuse)


def _check_layers(layers: list[Any], refuse: Callable[[str], UnsupportedBackboneError]) -> None:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    # exact types: the subclasses carry more than keys and values (recurrent state, indexer keys)
    odd = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if odd:
        raise refuse(f"some layers keep no plain key/value cache ({', '.join(sorted(odd))})")


def probe(model: PreTrainedModel, name: str, device: torch.device) -> int | None:
    """One pass over `[[0, 1], [0, 2]]`: finite, causal, cached? Returns the smallest attention window, if any.

    `device` is where its inputs go.

    Raises `UnsupportedBackboneError`, or `BackboneError` for weights that give no numbers.
    """
    import torch

    def refuse(reason: str) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(f"{name} ({type(model).__name__}) cannot be steered: {reason}")

    ids = torch.tensor([[0, 1], [0, 2]], device=device)
    try:
        with torch.inference_mode():
            out = model(
                inputs_embeds=model.get_input_embeddings()(ids),
                attention_mask=torch.ones_like(ids),
                position_ids=torch.tensor([[0, 1], [0, 1]], device=device),
                use_cache=True,
            )
    except TypeError as error:
        raise refuse("its forward takes no inputs_embeds or position_ids") from error
    except Exception as error:  # kernels of rounded weights assert, too
        raise BackboneError(f"{name}: a trial pass over two tokens failed: {error}") from error
    if out.logits.shape[-1] != model.config.vocab_size:
        raise BackboneError(
            f"{name}: {out.logits.shape[-1]} logits for a vocabulary of {model.config.vocab_size} in config.json"
        )
    if not torch.isfinite(out.logits).all():
        raise BackboneError(
            f"{name}: the logits are not finite in {model.dtype}",
            hint='The weights are damaged, or overflow in this dtype: try dtype="float32".',
        )
    if not torch.allclose(out.logits[0, 0], out.logits[1, 0], rtol=1e-2, atol=1e-2):
        raise refuse("a later token changes what an earlier one sees, so it is not causal")
    layers = getattr(getattr(out, "past_key_values", None), "layers", None)
    if not layers:
        raise refuse("it returns no key/value cache")
    _check_layers(layers, refuse)
    windows = [int(layer.sliding_window) for layer in layers if layer.is_sliding]
    if "local" in getattr(model.config, "attention_layers", ()):  # GPT-Neo's own way to say it
        windows.append(int(model.config.window_size))
    return min(windows, default=None)


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
