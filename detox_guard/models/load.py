"""Where models come from: hub, folder, GGUF file, adapter, an object already loaded, the embedded default.

Knows files, names and transformers' ways to load. Does not know: what can be steered (`checks`), decoding, text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard._files import usable_path
from detox_guard._threads import run_aside
from detox_guard.errors import BackboneError, BackboneNotFoundError, InvalidParamsError
from detox_guard.models.adapters import adapter_of, put_on
from detox_guard.models.backbone import Backbone, from_model, pick_device, pick_dtype
from detox_guard.models.checks import CONFIG_FILE, auto_class, causal_class, check_config
from detox_guard.models.default import (
    DEFAULT_ID,
    DEFAULT_REVISION,
    default_backbone_dir,
    default_gguf,
    default_is_cached,
)
from detox_guard.models.gguf import (
    OLLAMA,
    GgufModel,
    as_backbone,
    facts_of,
    kept_tokenizer,
    need_llamacpp,
    ollama_file,
    revision_of,
)
from detox_guard.models.gguf_tokenizer import read_saved, tokenizer_of
from detox_guard.models.options import LoadOptions
from detox_guard.models.quantization import INT4, as_config, is_quantized, need
from detox_guard.models.translate import translated

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_backbone"]

_NOT_FOR_OBJECTS = (
    "device_map", "max_memory", "offload_folder", "quantization_config", "attn_implementation", "gguf_file",
    "model_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """What transformers is to be handed (`source`: a folder or hub id), and our `id` for it."""

    source: str
    id: str
    gguf_file: str | None = None
    revision: str | None = None
    """Of the embedded default, which has no hub to ask."""

    @property
    def file(self) -> str | None:
        """The GGUF file, unless the id is its name."""
        return self.gguf_file if self.gguf_file != self.id else None


def load_backbone(
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    **loading: Any,
) -> Backbone:
    """Load a causal language model that can be steered.

    `model`: a hub id, a folder, a `.gguf` file, a LoRA adapter (its base is loaded with it), a loaded model or
    `PeftModel` (then `tokenizer` is required, and the model is moved only if `device` or `dtype` is given), or None for
    the embedded default. `tokenizer`, if given, takes the place of the model's own. `loading`: fields of `LoadOptions`.
    Weights are read from safetensors or GGUF only, never from pickles. The architecture is checked before weights are
    downloaded. Raises `BackboneNotFoundError`, `UnsupportedBackboneError`, `BackboneError`, and `InvalidParamsError`
    for a bad option.
    """
    import torch

    options = LoadOptions(**loading)
    first = torch.cuda.current_device() if torch.cuda.is_available() else None

    def load() -> Backbone:
        if first is not None:  # each thread has a current device of its own
            torch.cuda.set_device(first)
        return _load(model, tokenizer, options)

    return run_aside(load)


def _load(
    model: str | Path | PreTrainedModel | None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    options: LoadOptions,
) -> Backbone:
    if options.engine == "llamacpp":
        return _for_llamacpp(model, tokenizer, options)
    if model is not None and not isinstance(model, str | os.PathLike):
        return _wrapped(model, tokenizer, options)
    # What is bad is told of before anything is looked for.
    pick_dtype(options.dtype, pick_device(options.one_device))
    _check_int4(options)
    if model is None:
        place = _default(options)
    else:
        place = _locate(model, options.gguf_file)
        with translated(place.source):
            adapter = None if place.gguf_file else adapter_of(place.source, options)
        if adapter is not None:
            base = _locate(adapter.base, None)
            own = str(adapter.folder) if tokenizer is None and adapter.has_tokenizer else tokenizer
            loaded, its_tokenizer = _loaded(base, own, options.replace(revision=adapter.base_revision))
            with translated(place.source):
                loaded = put_on(loaded, its_tokenizer, adapter)
            told = {"adapter": adapter.kind, "base_id": base.id, "quantization": _rounded(loaded, options)}
            return from_model(loaded, its_tokenizer, id=place.id, revision=adapter.commit or options.revision, **told)
    loaded, its_tokenizer = _loaded(place, tokenizer, options)
    revision = place.revision or _commit(place, options) or options.revision
    told = {"quantization": _rounded(loaded, options), "file": place.file}
    return from_model(loaded, its_tokenizer, id=place.id, revision=revision, **told)


def _rounded(model: PreTrainedModel, options: LoadOptions) -> str | None:
    """Round a model in place, where `options` ask for what is ours to do; how."""
    if options.quantization_config != "int4":
        return None
    from detox_guard.models.four_bit import round_to_grid

    round_to_grid(model)
    return INT4


def _check_int4(options: LoadOptions) -> None:
    """int4 is computed with in bfloat16, on a CPU. Raises `InvalidParamsError`."""
    if options.quantization_config != "int4":
        return
    device = pick_device(options.one_device)
    if options.spreads or device.type != "cpu":
        raise InvalidParamsError("quantization_config", "int4", "on a CPU only", hint="On a GPU take nf4 or int8.")
    if options.dtype is not None and pick_dtype(options.dtype, device) != pick_dtype("bfloat16", device):
        raise InvalidParamsError("dtype", options.dtype, 'bfloat16, or none, with quantization_config="int4"')


def _for_llamacpp(model: Any, tokenizer: Any, options: LoadOptions) -> Backbone:
    """A GGUF file that llama.cpp serves: no weights are read here, only its tokenizer and what it is."""
    need_llamacpp()
    if model is None:
        file, id_, revision, named = default_gguf(), DEFAULT_ID, DEFAULT_REVISION, None
        if tokenizer is None and default_is_cached():
            with translated(id_):
                tokenizer = read_saved(default_backbone_dir())  # it was made from this very file
    elif not isinstance(model, str | os.PathLike):
        raise InvalidParamsError("model", model, 'a GGUF file, to be served by engine="llamacpp"')
    else:
        place = _locate(model, options.gguf_file)
        file, id_, named = _gguf_of(place, options), place.id, place.file
        revision = _commit(place, options) or options.revision or revision_of(file)
    facts = facts_of(file)
    if options.n_ctx and options.n_ctx > facts.positions:
        raise InvalidParamsError("n_ctx", options.n_ctx, f"at most {facts.positions}, which {id_} was trained for")
    if tokenizer is None:
        with translated(str(file.parent), file.name):
            its_tokenizer: Any = tokenizer_of(file, kept_tokenizer(file))
    else:
        its_tokenizer = _tokenizer(tokenizer, options)
    return as_backbone(GgufModel(file, facts, options.llamacpp), its_tokenizer, id_, revision, named)


def _gguf_of(place: _Place, options: LoadOptions) -> Path:
    """The file of a place, fetched from the hub if it is there. Raises `BackboneError`."""
    if place.gguf_file is None:
        raise BackboneError(
            f'{place.source}: no GGUF file, and engine="llamacpp" serves no other',
            hint="Pass a .gguf file, or a repository and gguf_file=…",
        )
    if Path(place.source).is_dir():
        return Path(place.source) / place.gguf_file
    from huggingface_hub import hf_hub_download

    known = ("token", "cache_dir", "local_files_only", "subfolder", "force_download")
    where = {name: value for name, value in options.hub.items() if name in known}
    with translated(place.source, place.gguf_file):
        return Path(hf_hub_download(place.source, place.gguf_file, revision=options.revision, **where))


def _wrapped(model: Any, tokenizer: Any, options: LoadOptions) -> Backbone:
    """A model that the caller loaded."""
    from torch import nn

    for name in _NOT_FOR_OBJECTS:
        if getattr(options, name) is not None:
            raise InvalidParamsError(name, getattr(options, name), "the model is loaded already: say it where it is")
    if isinstance(model, nn.Module) and not (options.device is None and options.dtype is None):
        device = getattr(model, "device", None) if options.device is None else pick_device(options.device)
        if device is not None:  # else it is no model, as `from_model` will say
            own = options.dtype in (None, "auto")
            model.to(device=device, dtype=None if own else pick_dtype(options.dtype, device))
    return from_model(model, _tokenizer(tokenizer, options), revision=options.revision)


def _default(options: LoadOptions) -> _Place:
    """The embedded model, fetched if it is not here."""
    from detox_guard.models import default as embedded

    for field in ("gguf_file", "revision"):
        if (value := getattr(options, field)) is not None:
            raise InvalidParamsError(field, value, "name the model it belongs to")
    folder = embedded.default_backbone_dir()
    revision = embedded.DEFAULT_REVISION if folder.name == embedded.FOLDER else folder.name
    return _Place(str(folder), embedded.DEFAULT_ID, revision=revision)


def _commit(place: _Place, options: LoadOptions) -> str | None:
    """The hub's commit of the files that were read; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(place.source).is_dir():
        return None
    file = "/".join(part for part in (options.hub.get("subfolder"), place.gguf_file or "config.json") if part)
    found = try_to_load_from_cache(place.source, file, options.cache_dir, options.revision)
    return Path(found).parts[-1 - len(Path(file).parts)] if isinstance(found, str) else None


def _loaded(place: _Place, tokenizer: Any, options: LoadOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model where `options` want it, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    source, gguf_file = place.source, place.gguf_file
    on_device = pick_device(options.one_device)
    if options.device_map is not None:
        need("accelerate", "device_map")
    where: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, **options.hub}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
    if not Path(source).is_dir():
        where["revision"] = options.revision or "main"
    with translated(source, gguf_file, options):
        config = AutoConfig.from_pretrained(source, **where)
        check_config(config, None if options.trust_remote_code else causal_class(config, place.id), place.id)
        if tokenizer is None:
            its_tokenizer = AutoTokenizer.from_pretrained(source, **where)
        else:
            its_tokenizer = _tokenizer(tokenizer, options)
        loaded, info = auto_class(config).from_pretrained(
            source, output_loading_info=True, **_how(config, gguf_file, options), **where
        )
        _check_whole(source, loaded, info)
        if gguf_file is not None:
            # dequantized on load; transformers would otherwise refuse to move or save the model
            del loaded.config.quantization_config
            loaded.is_quantized, loaded.hf_quantizer = False, None
        if not options.spreads and getattr(loaded, "hf_quantizer", None) is None:
            loaded.to(on_device)
    return loaded, its_tokenizer


def _how(config: PreTrainedConfig, gguf_file: str | None, options: LoadOptions) -> dict[str, Any]:
    """The keywords for the weights: number type, device, rounding, and what the user named besides."""
    on_device = pick_device(options.one_device)
    rounded = gguf_file is None and is_quantized(config)
    # What was saved rounded has kernels for one number type only, which its config names.
    asked = "auto" if options.dtype == "auto" or (rounded and options.dtype is None) else None
    ours = options.quantization_config == "int4"
    dtype = pick_dtype("bfloat16", on_device) if ours else asked or pick_dtype(options.dtype, on_device)
    how: dict[str, Any] = {"dtype": dtype, **options.weights}
    if gguf_file is None:
        how["use_safetensors"] = True
    if options.quantization_config is not None and not ours:
        how["quantization_config"] = as_config(options.quantization_config, how["dtype"])
    if options.spreads:
        how["device_map"] = options.device_map
    elif rounded or "quantization_config" in how:
        need("accelerate", "a quantized model")
        how["device_map"] = {"": on_device}  # rounded weights are made where they stay
    return how


def _check_whole(source: str, loaded: PreTrainedModel, info: dict[str, Any]) -> None:
    """transformers fills what the files lack with random numbers, leaves out what has no place, and only prints it."""
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise BackboneError(
            f"{source}: {len(info['missing_keys'])} weights are missing, {first!r} among them",
            hint="The files do not belong to this config.json, or the copy is incomplete; fetch it again.",
        )
    # Parts that the architecture does not have (a second head, old masks) are left out; one more weight of a layer
    # that it has (a bias) is not.
    layers = {path for path, module in loaded.named_modules() if any(True for _ in module.parameters(recurse=False))}
    odd = sorted(key for key in info["unexpected_keys"] if key.rpartition(".")[0] in layers)
    if odd:
        raise BackboneError(
            f"{source}: {len(odd)} weights have no place in the model, {odd[0]!r} among them",
            hint="config.json does not say what these files hold (attention_bias?), so they would be left out.",
        )


def _locate(model: str | os.PathLike[str], gguf_file: str | None) -> _Place:
    """What a name means: a folder, a GGUF file, one of Ollama's, or else a hub id."""
    if isinstance(model, str) and model.startswith(OLLAMA):
        file = ollama_file(model)
        return _Place(str(file.parent), model.removeprefix(OLLAMA).partition(":")[0], file.name)
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
        return _Place(str(file.parent), file.name, file.name)
    if path.is_dir():
        adapter, weights = (path / CONFIG_FILE).is_file(), any(path.glob("model*.safetensors*"))
        if adapter and weights:
            raise BackboneError(
                f"{path}: holds a model and a PEFT adapter", hint="Move the adapter into a folder of its own."
            )
        if not adapter and not (path / "config.json").is_file():
            raise BackboneError(f"{path}: no config.json in this folder", hint="Is it a model?")
        for entry in path.iterdir():
            if not entry.is_file() and not entry.is_dir():
                raise BackboneError(f"{entry}: a pipe, a device or a link to nothing; a model's folder holds files")
        return _Place(str(path), path.resolve().name)
    looks_like_path = not isinstance(model, str) or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_like_path or "\\" in str(model) or str(model).endswith(".gguf"):
        raise BackboneNotFoundError(f"{path}: no such file or folder")
    return _Place(str(model), str(model), gguf_file)


def _tokenizer(tokenizer: Any, options: LoadOptions) -> Any:
    """A tokenizer from its name or path; anything else is passed on for `from_model` to judge."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    with translated(str(tokenizer)):
        return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=options.trust_remote_code, **options.hub)
