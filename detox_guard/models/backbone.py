"""A causal language model with its tokenizer, and the facts about it that the engine needs.

Knows: what a loaded model is made of, and which device and dtype suit this machine. Does not know: where models come
from (`load`), what can be steered (`checks`), soft prompts, decoding, text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard.errors import BackboneError, InvalidParamsError, NotPicklableError, UnsupportedBackboneError
from detox_guard.models.adapters import kind_of, unwrapped
from detox_guard.models.checks import (
    Running,
    attention_of,
    check_config,
    learned_positions,
    max_positions,
    probe,
    running_of,
    text_part,
)
from detox_guard.models.options import CACHE_OPTIONS
from detox_guard.models.quantization import quantization_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from detox_guard.models.gguf import GgufModel

__all__ = ["Backbone", "fingerprint_of", "from_model", "pick_device", "pick_dtype"]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen causal language model, its tokenizer, and what the engine must know of them.

    `model` is in eval mode, without gradients. `device` is where its inputs go, `dtype` what it computes in; `spread`:
    its layers lie on several devices or on disk, and accelerate moves what passes. `id` is the hub id, or the name of
    the folder or GGUF file; `revision` the hub's commit, else a digest of the weights. `hidden_size` is the width of an
    input embedding, hence of a virtual token. `max_positions` None: no limit known. `learned_positions`: positions come
    from a table, so `max_positions` is hard. `window`: the smallest sliding (or chunked) attention window in tokens,
    None if every layer sees everything. `eos_token_ids` may be empty. `pad_token_id` is the end token, else 0, where
    the tokenizer has none; nothing is added to the vocabulary. `quantization`: how its weights were rounded, None if
    they were not. `adapter`: the kind of PEFT adapter in it, and `base_id` the id of the model below; None without one.
    `gguf`: the file that llama.cpp serves; `model` then raises whatever is asked of it. `also_called`: other names of
    the same model, as its file states them. `file`: the GGUF file, where `id` names a folder or repository of several.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_positions: int | None
    learned_positions: bool
    window: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    has_chat_template: bool
    running: Running = field(default_factory=Running)
    spread: bool = False
    quantization: str | None = None
    adapter: str | None = None
    base_id: str | None = None
    gguf: GgufModel | None = None
    also_called: tuple[str, ...] = ()
    file: str | None = None

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Backbone:
        """Itself: weights are shared, and an engine may have laid them out in its own way."""
        return self

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        raise NotPicklableError(f"the weights of {self.id!r} belong to their process", hint="load them over there")

    @property
    def identity(self) -> dict[str, str | None]:
        """What makes its outputs what they are, as JSON: `model`, `revision` and `dtype`; `file`, `quantization`,
        `adapter`, `base`, `engine` (where it is not torch) and number types of llama.cpp's cache if there are any."""
        told = {"model": self.id, "revision": self.revision, "dtype": str(self.dtype).removeprefix("torch.")}
        more = {"quantization": self.quantization, "adapter": self.adapter, "base": self.base_id}
        more["file"] = self.file
        if self.gguf is not None:
            told = {**told, "engine": "llamacpp"}
            more |= {name: None if (how := self.gguf.how.get(name)) is None else str(how) for name in CACHE_OPTIONS}
        return {**told, **{name: value for name, value in more.items() if value is not None}}


def from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    id: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    base_id: str | None = None,
    quantization: str | None = None,
    file: str | None = None,
) -> Backbone:
    """Wrap a model that is already loaded, where it is; it is put into eval mode and its gradients are turned off.

    A `PeftModel` is served with its active adapters in it. `adapter` and `base_id` tell of one that was merged,
    `quantization` of rounding that the config does not name, `file` of the GGUF it was read from.

    Runs one forward pass over four tokens to see that the model is causal, finite and has a plain K/V cache.
    Raises `UnsupportedBackboneError`, `BackboneError`, or `InvalidParamsError` if either argument is of the wrong type.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    adapter = adapter or kind_of(model)
    if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config"):
        model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise InvalidParamsError("model", model, "a name, a path, or a transformers PreTrainedModel")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InvalidParamsError("tokenizer", tokenizer, "a loaded model needs its PreTrainedTokenizer")
    name = id or Path(getattr(model.config, "_name_or_path", "") or "").name or str(model.config.model_type)
    device_map = getattr(model, "hf_device_map", {})
    model = text_part(model)
    config = model.config
    check_config(config, type(model), name)
    attention = attention_of(config)
    if attention not in (None, "eager", "sdpa"):
        raise UnsupportedBackboneError(
            f"{name}: attn_implementation {attention!r} takes no mask of the engine's kind",
            hint="Load the model with attn_implementation='sdpa'.",
        )
    spread = len(set(device_map.values())) > 1 or hasattr(model, "_hf_hook")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if not spread and (len(devices) != 1 or "meta" in devices):
        raise BackboneError(
            f"{name}: the weights lie on {', '.join(sorted(devices)) or 'no device'}, not on one device",
            hint="Load the model with a device_map, so that accelerate moves what passes between its layers.",
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedBackboneError(f"{name}: {type(model).__name__} has no language-model head")
    model.eval().requires_grad_(False)
    device = _input_device(model)
    window = probe(model, name, device)

    text = config.get_text_config(decoder=True)
    vocab_size = int(text.vocab_size)
    if max(tokenizer("The quick brown fox").input_ids, default=0) >= vocab_size:
        raise BackboneError(f"{name}: wrong tokenizer: it gives ids past the vocabulary of {vocab_size}")
    eos_token_ids = tuple(token for token in _eos_token_ids(model, tokenizer) if token < vocab_size)
    pad = tokenizer.pad_token_id
    if pad is None or pad >= vocab_size:
        pad = next(iter(eos_token_ids), 0)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        id=name,
        revision=revision or fingerprint_of(model),
        device=device,
        dtype=model.dtype,
        hidden_size=int(model.get_input_embeddings().weight.shape[1]),
        num_layers=int(getattr(text, "num_hidden_layers", 0)),
        vocab_size=vocab_size,
        max_positions=max_positions(text, name),
        learned_positions=learned_positions(model),
        window=window,
        eos_token_ids=eos_token_ids,
        pad_token_id=int(pad),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        running=running_of(model),
        spread=spread,
        quantization=quantization or quantization_of(config),
        adapter=adapter,
        base_id=base_id,
        file=file,
    )


def fingerprint_of(model: PreTrainedModel) -> str:
    """What tells apart two models of one name that no hub tells apart: a digest of a few numbers of every weight.

    The same for a model in memory and on disk; rounded weights have one of their own.
    """
    import torch

    few = [flat[:: max(1, len(flat) // 8)].cpu() for weight in _weights(model) if len(flat := weight.flatten())]
    # As bfloat16, so that a model has one fingerprint in float32 and in bfloat16.
    numbers = torch.cat([some.to(torch.bfloat16) for some in few]).view(torch.int16).numpy()
    return f"weights-{hashlib.sha256(numbers.tobytes()).hexdigest()[:12]}"


def _weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Every weight once, in order; those that lie on disk are fetched one module at a time."""
    from contextlib import nullcontext

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for path, parameter in model.named_parameters():
        if not parameter.is_meta:
            yield from _plain_parts(parameter.detach())
        elif path not in tied:
            from accelerate.utils import align_module_device

            parent, _, leaf = path.rpartition(".")
            module = model.get_submodule(parent)
            with align_module_device(module) if hasattr(module, "_hf_hook") else nullcontext():
                yield from _plain_parts(getattr(module, leaf).detach())


def _plain_parts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a tensor of rounded numbers is made of (its integers, its scales); an ordinary one is itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(weight, name))


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where ids and embeddings go: where the input embeddings lie, or where accelerate brings them."""
    import torch

    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return embeddings.weight.device if device is None else torch.device(device)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else CUDA if there is one, else the CPU (MPS only when asked for).

    Raises `InvalidParamsError` if it is no device or is not present here.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise InvalidParamsError("device", device, 'one of "cpu", "cuda", "cuda:N", "mps", "xpu"') from None
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
    }
    count = present.get(picked.type, 0)
    if (picked.index or 0) >= count:
        raise InvalidParamsError(
            "device",
            str(device),
            f"this machine has {count} {picked.type} devices that torch {torch.__version__} can use",
            hint='Leave device out to choose automatically, or pass device="cpu".',
        )
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; None and "auto" choose what `device` computes fastest without overflow.

    CUDA: bfloat16, or float16 before Ampere. CPU: bfloat16 with AVX512-BF16 or AMX, else float32. MPS and others:
    float16. Raises `InvalidParamsError`.
    """
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype is not None and dtype != "auto":
        picked = names.get(dtype) if isinstance(dtype, str) else dtype
        if picked is None or picked not in names.values():
            raise InvalidParamsError("dtype", dtype, f'"auto" or one of {", ".join(names)}')
        return picked
    if device.type == "cpu":
        # private names in torch, hence the guard: a torch without them falls back to float32
        tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return torch.bfloat16 if any(test() for test in tests if test is not None) else torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End tokens named by the generation config, the config and the tokenizer, in that order, each once."""
    generation = getattr(model, "generation_config", None)
    found: dict[int, None] = {}
    for source in (generation, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        for token in ids if isinstance(ids, list | tuple) else [ids]:
            if token is not None:
                found[int(token)] = None
    return tuple(found)
