"""Loads a causal language model with its tokenizer and says what it can and cannot do.

Knows: where models come from (hub, folder, GGUF file, an object already loaded, the embedded default), which device and
dtype to use, and which architectures have the key/value cache that steering needs. Does not know: soft prompts,
decoding, text. What transformers raises is translated into the `BackboneError` tree, the original chained.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard._files import read_json, usable_path
from detox_guard.errors import (
    BackboneError,
    BackboneNotFoundError,
    DataError,
    DetoxGuardError,
    InvalidParamsError,
    NotPicklableError,
    UnsupportedBackboneError,
)
from detox_guard.models.checks import (
    CONFIG_FILE,
    NO_SOFT_PROMPT,
    STEPWISE,
    Layout,
    causal_class,
    check_config,
    layout_of,
    learned_positions,
    max_positions,
    probe,
    takes_embeddings,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Backbone", "from_model", "load_backbone", "pick_device", "pick_dtype"]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen causal language model, its tokenizer, and what the engine must know of them.

    `model` is in eval mode, without gradients, on one `device` in one `dtype`. `id` is the hub id, or the base name of
    the folder or GGUF file; `revision` the hub's commit, else a digest of the weights. `hidden_size` is the width of an
    input embedding, hence of a virtual token. `max_positions` None: no limit known. `learned_positions`: positions come
    from a table, so `max_positions` is hard. `window`: the smallest sliding (or chunked) attention window in tokens,
    None if every layer sees everything. `eos_token_ids` may be empty. `pad_token_id` is the end token, else 0, where
    the tokenizer has none; nothing is added to the vocabulary.
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
    layout: Layout = "padded"
    stepwise: bool = False
    takes_embeddings: bool = True

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Backbone:
        """Itself: weights are shared, and an engine may have laid them out in its own way."""
        return self

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        raise NotPicklableError(f"the weights of {self.id!r} belong to their process", hint="load them over there")

    @property
    def identity(self) -> dict[str, str | None]:
        """What makes its outputs what they are, as JSON: `model`, `revision` and `dtype`."""
        return {"model": self.id, "revision": self.revision, "dtype": str(self.dtype).removeprefix("torch.")}


def load_backbone(
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> Backbone:
    """Load a causal language model that can be steered.

    `model`: a hub id, a folder, a `.gguf` file, a loaded model (then `tokenizer` is required, and the model is moved
    only if `device` or `dtype` is given), or None for the embedded default. `gguf_file` names a GGUF file inside a hub
    repository or folder. `tokenizer`, if given, takes the place of the model's own. Weights are read from safetensors
    or GGUF only, never from pickles. The architecture is checked before weights are downloaded.
    Raises `BackboneNotFoundError`, `UnsupportedBackboneError`, `BackboneError`, and `InvalidParamsError` for a bad
    device or dtype.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

    if model is not None and not isinstance(model, str | os.PathLike):
        if isinstance(model, PreTrainedModel) and not (device is None and dtype is None):
            to_device = model.device if device is None else pick_device(device)
            model.to(device=to_device, dtype=model.dtype if dtype is None else pick_dtype(dtype, to_device))
        return from_model(model, _tokenizer(tokenizer, trust_remote_code), revision=revision)

    on_device = pick_device(device)
    in_dtype = pick_dtype(dtype, on_device)
    if model is None:
        from detox_guard.models import default as embedded

        for field, value in (("gguf_file", gguf_file), ("revision", revision)):
            if value is not None:
                raise InvalidParamsError(field, value, "name the model it belongs to")
        folder = embedded.default_backbone_dir()
        source, name = str(folder), embedded.DEFAULT_ID
        revision = embedded.DEFAULT_REVISION if folder.name == embedded.FOLDER else folder.name
    else:
        source, name, gguf_file = _locate(model, gguf_file)

    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
    if not Path(source).is_dir():
        where["revision"] = revision or "main"
    with _translated(source, gguf_file):
        config = AutoConfig.from_pretrained(source, **where)
        check_config(config, None if trust_remote_code else causal_class(config, name), name)
        own = tokenizer if tokenizer is not None else source
        if isinstance(own, PreTrainedTokenizerBase):
            loaded_tokenizer = own
        else:
            loaded_tokenizer = AutoTokenizer.from_pretrained(
                own, **(where if own == source else {"trust_remote_code": trust_remote_code})
            )
        weights = {} if gguf_file is not None else {"use_safetensors": True}
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=in_dtype, output_loading_info=True, **weights, **where
        )
        # transformers fills what the file lacks with random numbers and only prints a report
        if info["missing_keys"]:
            first = sorted(info["missing_keys"])[0]
            raise BackboneError(
                f"{source}: {len(info['missing_keys'])} weights are missing, {first!r} among them",
                hint="The files do not belong to this config.json, or the copy is incomplete; fetch it again.",
            )
        # Parts that the architecture does not have (a second head, old masks) are left out; one more weight of a layer
        # that it has (a bias) is not.
        layers = {
            path for path, module in loaded.named_modules() if any(True for _ in module.parameters(recurse=False))
        }
        odd = sorted(key for key in info["unexpected_keys"] if key.rpartition(".")[0] in layers)
        if odd:
            raise BackboneError(
                f"{source}: {len(odd)} weights have no place in the model, {odd[0]!r} among them",
                hint="config.json does not say what these files hold (attention_bias?), so they would be left out.",
            )
        if gguf_file is not None:
            # dequantized on load; transformers would otherwise refuse to move or save the model
            del loaded.config.quantization_config
            loaded.is_quantized, loaded.hf_quantizer = False, None
        loaded.to(on_device)
    commit = getattr(config, "_commit_hash", None)
    return from_model(loaded, loaded_tokenizer, id=name, revision=revision if model is None else commit or revision)


def from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    id: str | None = None,
    revision: str | None = None,
) -> Backbone:
    """Wrap a model that is already loaded, where it is; it is put into eval mode and its gradients are turned off.

    Runs one forward pass over four tokens to see that the model is causal, finite and has a plain K/V cache.
    Raises `UnsupportedBackboneError`, `BackboneError`, or `InvalidParamsError` if either argument is of the wrong type.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config"):
        raise UnsupportedBackboneError(
            f"a {type(model).__name__} is a model behind an adapter",
            hint="Merge a LoRA adapter: model.merge_and_unload(). Save a soft prompt: its folder is a detoxifier.",
        )
    if not isinstance(model, PreTrainedModel):
        raise InvalidParamsError("model", model, "a name, a path, or a transformers PreTrainedModel")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InvalidParamsError("tokenizer", tokenizer, "a loaded model needs its PreTrainedTokenizer")
    config = model.config
    name = id or Path(getattr(config, "_name_or_path", "") or "").name or str(config.model_type)
    check_config(config, type(model), name)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise UnsupportedBackboneError(
            f"{name}: attn_implementation {attention!r} takes no mask of the engine's kind",
            hint="Load the model with attn_implementation='sdpa'.",
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise BackboneError(
            f"{name}: the weights lie on {', '.join(sorted(devices)) or 'no device'}, not on one device",
            hint="Load the model without device_map, or with a single device.",
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedBackboneError(f"{name}: {type(model).__name__} has no language-model head")
    model.eval().requires_grad_(False)
    window = probe(model, name)

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
        device=model.device,
        dtype=model.dtype,
        hidden_size=int(model.get_input_embeddings().weight.shape[1]),
        num_layers=int(text.num_hidden_layers),
        vocab_size=vocab_size,
        max_positions=max_positions(text, name),
        learned_positions=learned_positions(model),
        window=window,
        eos_token_ids=eos_token_ids,
        pad_token_id=int(pad),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        layout=layout_of(config, type(model)),
        stepwise=config.get_text_config(decoder=True).model_type in STEPWISE,
        takes_embeddings=takes_embeddings(config, type(model)),
    )


def fingerprint_of(model: PreTrainedModel) -> str:
    """What tells apart two models of one name that no hub tells apart: a digest of a few numbers of every weight."""
    import torch

    few = [weight[:: max(1, len(weight) // 8)] for weight in (p.detach().flatten() for p in model.parameters())]
    # As bfloat16, so that a model has one fingerprint in float32 and in bfloat16.
    numbers = torch.cat(few).to(torch.bfloat16).view(torch.int16).cpu().numpy()
    return f"weights-{hashlib.sha256(numbers.tobytes()).hexdigest()[:12]}"


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


def _locate(model: str | os.PathLike[str], gguf_file: str | None) -> tuple[str, str, str | None]:
    """What to hand to transformers: (folder or hub id, our id, GGUF file name)."""
    path = usable_path(model, BackboneNotFoundError)
    if path.is_file() or (gguf_file is not None and path.is_dir()):
        file = path if path.is_file() else path / str(gguf_file)
        if not file.is_file():
            raise BackboneNotFoundError(f"{file}: no such file")
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise BackboneError(
                    f"{file}: not a GGUF file (it does not begin with 'GGUF')",
                    hint="Pass the folder that holds config.json, or a .gguf file.",
                )
        return str(file.parent), file.name, file.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(f"{path}: no config.json in this folder", hint=_adapter_hint(path) or "Is it a model?")
        if (path / "adapter_config.json").is_file():
            raise BackboneError(
                f"{path}: holds a model and a PEFT adapter",
                hint=f"Move the adapter into a folder of its own. {_adapter_hint(path)}",
            )
        for entry in path.iterdir():
            if not entry.is_file() and not entry.is_dir():
                raise BackboneError(f"{entry}: a pipe, a device or a link to nothing; a model's folder holds files")
        return str(path), path.resolve().name, None
    looks_like_path = not isinstance(model, str) or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_like_path or "\\" in str(model) or str(model).endswith(".gguf"):
        raise BackboneNotFoundError(f"{path}: no such file or folder")
    return str(model), str(model), gguf_file


def _adapter_hint(folder: Path) -> str:
    """What to do with the PEFT adapter in a folder; empty if there is none."""
    if not (folder / CONFIG_FILE).is_file():
        return ""
    try:
        kind = read_json(folder / CONFIG_FILE)["peft_type"]
    except (DataError, LookupError, TypeError):
        kind = None
    return "It holds a soft prompt: pass it as the detoxifier." if kind == "PROMPT_TUNING" else NO_SOFT_PROMPT


def _tokenizer(tokenizer: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """A tokenizer from its name or path; anything else is passed on for `from_model` to judge."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    with _translated(str(tokenizer)):
        return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)


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


@contextmanager
def _translated(source: str, gguf_file: str | None = None) -> Iterator[None]:
    """Turn what transformers, huggingface_hub and safetensors raise into ours, the original chained."""
    from huggingface_hub import errors as hub

    absent = (
        hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.LocalEntryNotFoundError,
        hub.OfflineModeIsEnabled, hub.HFValidationError,
    )  # fmt: skip
    what = f"{source}/{gguf_file}" if gguf_file else source
    try:
        yield
    except DetoxGuardError:
        raise
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
            causes.append(cause)
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if not Path(source).is_dir() and any(isinstance(cause, absent) for cause in causes):
            raise BackboneNotFoundError(
                f"{what}: no such model on the hub or in its cache: {line}",
                hint="Check the name and the network (HF_HUB_OFFLINE uses cached copies only), or pass a local folder.",
            ) from error
        hint = "The file may be damaged or incomplete; fetch it again."
        if "trust_remote_code" in str(error):
            hint = "If you have read and trust the code of this repository, pass trust_remote_code=True."
        elif "config.json" in str(error) and "does not appear to have a file" in str(error):
            hint = "Is it a model? A repository that holds an adapter alone has to be merged into its model first."
        elif "no file named" in str(error) or "does not appear to have a file" in str(error):
            hint = "Weights are read from safetensors or GGUF only; convert pickled .bin weights first."
        raise BackboneError(f"{what}: cannot be loaded: {type(error).__name__}: {line}", hint=hint) from error
