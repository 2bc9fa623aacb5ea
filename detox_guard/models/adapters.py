"""PEFT adapters that change a model (LoRA and its kin). Knows their folders and files; knows no soft prompt.

A LoRA adapter is part of the model: the generator's row and the detoxifier's go through it alike. Where its weights can
be added to the model's they are, so that it costs nothing; else it stays beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard._files import read_json
from detox_guard.errors import BackboneError, DataError, UnsupportedBackboneError
from detox_guard.models.checks import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from detox_guard.models.options import LoadOptions

__all__ = ["Adapter", "adapter_of", "kind_of", "put_on", "unwrapped"]

_WEIGHTS_FILE = "adapter_model.safetensors"
_WANTED = [CONFIG_FILE, _WEIGHTS_FILE, "*token*", "vocab*", "merges.txt", "*.model", "*.jinja"]
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT", "ADAPTION_PROMPT")
_SOFT_PROMPT = "It holds a soft prompt: pass it as the detoxifier."


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and what it says: `kind` (LORA, …), the `base` model and its revision. `commit`: the hub's,
    None for a folder of the user's own."""

    folder: Path
    kind: str
    base: str
    base_revision: str | None
    commit: str | None

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def adapter_of(source: str, options: LoadOptions) -> Adapter | None:
    """The adapter in a folder or hub repository; None if it holds none. Only safetensors are read.

    Raises `UnsupportedBackboneError` for adapters that are no part of a model, `BackboneError` for broken ones.
    """
    folder, commit = Path(source), None
    if not folder.is_dir():
        found = _on_hub(source, options)
        if found is None:
            return None
        folder, commit = found, found.name
    if not (folder / CONFIG_FILE).is_file():
        return None
    try:
        config = read_json(folder / CONFIG_FILE)
        kind = str(config["peft_type"])
    except (DataError, LookupError, TypeError) as error:
        raise BackboneError(
            f"{source}: {CONFIG_FILE} names no peft_type", hint="Is it a PEFT adapter? Save it again."
        ) from error
    _check(source, kind, config)
    if not (folder / _WEIGHTS_FILE).is_file():
        raise BackboneError(
            f"{source}: no {_WEIGHTS_FILE} beside {CONFIG_FILE}",
            hint="Weights are read from safetensors only; PeftModel.save_pretrained writes them.",
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BackboneError(
            f"{source}: {CONFIG_FILE} does not name the model that the adapter belongs to",
            hint="Write its hub id or folder there, as base_model_name_or_path.",
        )
    return Adapter(folder, kind, base, config.get("revision"), commit)


def _on_hub(name: str, options: LoadOptions) -> Path | None:
    """The folder in the hub's cache of an adapter and its tokenizer, fetched if need be; None if it has none."""
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    known = {key: value for key, value in options.hub.items() if key in ("token", "cache_dir", "local_files_only")}
    revision = options.revision or "main"
    if find_adapter_config_file(name, revision=revision, **known) is None:
        return None
    return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, **known))


def _check(source: str, kind: str, config: Mapping[str, Any]) -> None:
    """Raises `UnsupportedBackboneError` unless both rows of a batch can go through such an adapter."""
    if kind in _PROMPTS:
        hint = (
            _SOFT_PROMPT if kind == "PROMPT_TUNING" else "A LoRA adapter can be loaded; a soft prompt, as a detoxifier."
        )
        raise UnsupportedBackboneError(f"{source}: a {kind} adapter is no model", hint=hint)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedBackboneError(
            f"{source}: the adapter is for {config['task_type']}, not for a causal language model"
        )
    if config.get("alora_invocation_tokens"):
        raise UnsupportedBackboneError(
            f"{source}: an activated LoRA starts at certain tokens of the prompt, which rows under way do not show"
        )


def put_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Adapter) -> PreTrainedModel:
    """The model with the adapter in it: merged, or beside weights that cannot be added to (quantized, spread)."""
    from peft import PeftModel

    if any(parameter.is_meta for parameter in model.parameters()):  # PEFT would load nothing, and only warn
        raise BackboneError(
            f"the adapter in {adapter.folder.name} cannot be put on weights that are offloaded",
            hint="Leave more memory in max_memory, or save the merged model (merge_and_unload) and load that.",
        )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # tokens that came with the adapter
    tuned = PeftModel.from_pretrained(model, str(adapter.folder))
    fixed = getattr(model, "hf_quantizer", None) is not None or hasattr(model, "hf_device_map")
    if not fixed and hasattr(tuned, "merge_and_unload"):
        try:
            merged: PreTrainedModel = tuned.merge_and_unload()
            return merged
        except (NotImplementedError, AttributeError, ValueError):
            pass  # of a kind that only acts beside the weights
    return unwrapped(tuned)


def unwrapped(tuned: Any) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, whose layers go through its active adapters.

    Raises `UnsupportedBackboneError` for soft prompts and for adapters that would act on one row only.
    """
    active = tuned.active_adapters if hasattr(tuned, "active_adapters") else [tuned.active_adapter]
    for name in active:
        config = tuned.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        task = getattr(config.task_type, "value", config.task_type)
        _check(type(tuned).__name__, kind, {**vars(config), "task_type": task})
    model: PreTrainedModel = tuned.get_base_model()
    return model


def kind_of(model: Any) -> str | None:
    """The adapters that act in a model, such as `LORA`; None without one."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    return "+".join(sorted({str(getattr(one.peft_type, "value", one.peft_type)) for one in configs.values()}))
