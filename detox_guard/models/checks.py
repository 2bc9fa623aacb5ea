"""What kinds of model can be steered. Knows configs and one trial forward pass; loads nothing.

Steering needs a decoder-only text model in which no token sees a later one. Each thing else is refused with its reason.
How a model that is served can be run, `Layout`, is told from its config and its class too.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from detox_guard.errors import BackboneError, UnsupportedBackboneError

if TYPE_CHECKING:
    from collections.abc import Container

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "CONFIG_FILE",
    "NO_SOFT_PROMPT",
    "REFUSED",
    "Layout",
    "Running",
    "attention_of",
    "auto_class",
    "causal_class",
    "check_config",
    "learned_positions",
    "max_positions",
    "probe",
    "running_of",
    "text_part",
    "windows_of",
]

Layout = Literal["padded", "rows", "alone", "recompute"]


class Running(NamedTuple):
    """How a model is run without an error in any digit but the last."""

    layout: Layout = "padded"
    """padded: prompts padded and computed together, then one pass for all rows, the engine's masks. rows: each prompt
    alone, then one pass for all rows, the model's own masks. alone: a pass a row, the model's own cache. recompute: a
    pass a row, which reads all of it again, for want of a cache."""
    stepwise: bool = False
    """What follows a past is read a token a pass: the model's recurrence begins anew in a longer one."""
    takes_embeddings: bool = True
    """Virtual tokens can be fed. Not where layers look the token ids up once more."""
    first_position: int = 0
    """The position of a row's first token."""
    windows: tuple[tuple[str, int | None], ...] = ()
    """Where the engine's masks serve layers with windows: each layer's kind, and how many tokens back it sees, itself
    among them (None: all). Each kind has a mask. Empty where all layers see everything."""

    @property
    def view_kinds(self) -> frozenset[Literal["embeddings", "tokens"]]:
        """What a view may be made of."""
        return frozenset({"embeddings", "tokens"} if self.takes_embeddings else {"tokens"})


_ROW_LAYERS = {
    "DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer", "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer",
}  # fmt: skip
"""transformers' kinds of cache layer that a batch of rows can hold."""
_MASK_A_KIND = {
    "afmoe", "beam", "cohere2", "cohere2_moe", "cohere_compass_text", "cwm", "dots1", "exaone4", "exaone_moe",
    "flint", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "gpt_oss", "granite_swa",
    "granitemoe_swa", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "ministral", "modernbert-decoder",
    "muse_glimmer_text", "muse_spark_text", "olmo3", "qwen2", "qwen2_moe", "qwen3", "vaultgemma",
}  # fmt: skip
"""Types with windows that take a mask from outside for each kind of layer."""
_ONE_MASK = frozenset({"mistral", "ministral3", "mixtral", "phi3", "phimoe", "starcoder2", "qwen3_moe"})
"""Types with one window in all layers, whatever `layer_types` says, that take a mask from outside. Other types with
windows make their own."""
_THROUGH = {
    "aria", "aya_vision", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_vl",
    "deepseek_vl_hybrid", "exaone4_5", "fuyu", "gemma3", "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe",
    "glm_ocr", "glmga", "got_ocr2", "granite_docling", "hunyuan_vl", "hyperclovax_vision_v2", "idefics2",
    "idefics3", "internvl", "janus", "kimi_k25", "lighton_ocr", "llava", "llava_next", "llava_next_video",
    "llava_onevision", "minimax_m3_vl", "mistral3", "molmo2", "muse_glimmer", "muse_spark", "ovis2", "paddleocr_vl",
    "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe_thinker",
    "qwen3_vl", "qwen3_vl_moe", "shieldgemma2", "smolvlm", "step3p7", "video_llama_3", "video_llava", "vipllava",
}  # fmt: skip
"""Types of text and images that hand masks and positions on to their text model as they are."""
_ALONE = frozenset(
    {"llama4", "llama4_text", "roformer", "trocr", "ctrl", "git", "mllama_text_model", "minimax", "qwen4_exp_text"}
    | {"glm5_next_text"}
)
"""Types that place a token by the length of the cache (Llama 4 scales its queries by it), or want their own cache, or
pick whole blocks of tokens, which begin elsewhere in a padded row."""
_NO_CACHE = frozenset({"recurrent_gemma", "xlstm", "moss_transcribe_diarize", "blt"})
"""Types that keep their states in the module, where no two rows can have their own, or whose cache takes no second part
of a prompt."""
_STEPWISE = frozenset({"mamba", "falcon_mamba", "jamba", "zamba"})
"""Types of the first Mamba, whose scan takes no state to begin with."""
_PAD_FIRST = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
    | {"kosmos_2_text_model", "kosmos_2_5_text_model"}
)
"""Types that count positions from behind the padding's."""
_INSIDE = {
    "blip-2": "language_model", "instructblip": "language_model", "instructblipvideo": "language_model",
    "nemotron_h_omni": "language_model", "kosmos-2": "text_model",
}  # fmt: skip
"""Types that do not run without an image, and where their causal language model lies."""
_IDS_ONLY = frozenset({"deepseek_v4", "blt"})
"""Types that route or patch tokens by their ids."""
REFUSED = {
    "cpmant": "its context is read in both directions",
    "diffusion_gemma": "it writes by diffusion, whole blocks at a time",
    "doge": "its attention picks a few of all tokens, so a later one changes what an earlier one sees",
    "gemma4_assistant": "it is a draft, which reads the keys and values of another model",
    "gemma4_unified_assistant": "it is a draft, which reads the keys and values of another model",
    "idefics": "transformers runs it with an image only",
    "pi0": "it gives a robot's movements, not text",
    "reformer": "its attention hashes tokens at random, and whole chunks of them",
    "unlimited_ocr": "its window is of the reply only, so what a token sees depends on where the prompt ended",
    "xlnet": "its context is read in both directions",
}
"""Types that no engine could steer exactly, and why."""

_PROBE = 6

CONFIG_FILE = "adapter_config.json"
"""Of every PEFT adapter."""
NO_SOFT_PROMPT = "Another adapter (LoRA, say) is part of the model: pass its folder as the model."


def auto_class(config: PreTrainedConfig) -> Any:
    """What of transformers loads such a model: as a causal one if it can, else as one of images and text, of which the
    text alone is used."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def causal_class(config: PreTrainedConfig, name: str) -> Any:
    """The class that `auto_class` will build. Raises `UnsupportedBackboneError` if there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise UnsupportedBackboneError(f"{name}: {config.model_type} is no causal language model")


def check_config(config: PreTrainedConfig, cls: Any, name: str) -> None:
    """Refuse what can be told from the config and the class alone, before any weight is read.

    `cls` None: not known yet (remote code); `from_model` checks again with the class.
    Raises `UnsupportedBackboneError`.
    """

    def refuse(reason: str) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(
            f"{name} ({config.model_type}) cannot be steered: {reason}",
            hint="Nearly every decoder-only model can be: docs/models.md has the table.",
        )

    if config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder; only decoder-only models are served")
    if config.model_type in REFUSED:
        raise refuse(REFUSED[config.model_type])


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside one that does not run without an image; else the model itself."""
    place = _INSIDE.get(str(model.config.model_type))
    return model if place is None else model.get_submodule(place)


def running_of(model: PreTrainedModel) -> Running:
    """How this model is run."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    text = config.get_text_config(decoder=True)
    kind = str(text.model_type)
    layout = _layout(config, takes)
    return Running(
        layout=layout,
        stepwise=kind in _STEPWISE,
        takes_embeddings=_takes_embeddings(config, takes),
        first_position=int(text.pad_token_id or 0) + 1 if kind in _PAD_FIRST else 0,
        windows=windows_of(text) if layout == "padded" else (),
    )


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention that the text model runs: a wrapper may have another one for its images."""
    return getattr(config.get_text_config(decoder=True), "_attn_implementation", None)


def windows_of(config: PreTrainedConfig) -> tuple[tuple[str, int | None], ...]:
    """`Running.windows` of a text model's config: empty also where a kind of layer has several windows."""
    from transformers import DynamicCache

    if config.model_type in _ONE_MASK:
        return (("", config.sliding_window),) * config.num_hidden_layers if config.sliding_window else ()
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    kinds = getattr(config, "layer_types", None) or [str(window) for window in windows]
    layers = tuple(zip(kinds, windows, strict=False))
    return layers if any(windows) and len(set(layers)) == len(set(kinds)) else ()


def _layout(config: PreTrainedConfig, takes: Container[str]) -> Layout:
    from transformers import DynamicCache

    text = config.get_text_config(decoder=True)
    if config.model_type in _NO_CACHE or not ("past_key_values" in takes or "cache_params" in takes):
        return "recompute"
    names = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if text.model_type in _ALONE or not names <= _ROW_LAYERS:
        return "alone"
    own = (
        (text is not config and config.model_type not in _THROUGH)
        or text.model_type in _PAD_FIRST
        or getattr(text, "alibi", False)
    )
    if own or "position_ids" not in takes or "local" in getattr(text, "attention_layers", ()):
        return "rows"
    if names == {"DynamicLayer"} and (text.model_type in _MASK_A_KIND or not getattr(text, "sliding_window", None)):
        return "padded"
    takes_masks = text.model_type in _ONE_MASK or (text.model_type in _MASK_A_KIND and windows_of(text))
    return "padded" if takes_masks else "rows"


def _takes_embeddings(config: PreTrainedConfig, takes: Container[str]) -> bool:
    text = config.get_text_config(decoder=True)
    per_layer = getattr(text, "hidden_size_per_layer_input", None) or text.model_type in _IDS_ONLY
    return "inputs_embeds" in takes and not per_layer


def probe(model: PreTrainedModel, name: str, device: torch.device) -> int | None:
    """One pass over two rows that end differently: finite, causal? Returns the smallest attention window, if any.

    `device` is where its inputs go.

    Raises `UnsupportedBackboneError`, or `BackboneError` for weights that give no numbers.
    """
    import torch

    def refuse(reason: str) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(f"{name} ({type(model).__name__}) cannot be steered: {reason}")

    config = model.config.get_text_config(decoder=True)
    takes = inspect.signature(model.forward).parameters
    ids = torch.arange(_PROBE, device=device).repeat(2, 1)
    ids[1, -1] += 1
    inputs: dict[str, Any] = {"input_ids": ids}
    if _takes_embeddings(model.config, takes):
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    if "use_cache" in takes:
        inputs["use_cache"] = False
    try:
        with torch.inference_mode():
            out = model(**inputs)
    except Exception as error:  # kernels of rounded weights assert, too
        raise BackboneError(f"{name}: a trial pass over {_PROBE} tokens failed: {error}") from error
    if out.logits.shape[-1] != config.vocab_size:
        raise BackboneError(
            f"{name}: {out.logits.shape[-1]} logits for a vocabulary of {config.vocab_size} in config.json"
        )
    if not torch.isfinite(out.logits).all():
        raise BackboneError(
            f"{name}: the logits are not finite in {model.dtype}",
            hint='The weights are damaged, or overflow in this dtype: try dtype="float32".',
        )
    if not torch.allclose(out.logits[0, :-1], out.logits[1, :-1], rtol=1e-2, atol=1e-2):
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
