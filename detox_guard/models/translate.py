"""What the libraries that load models raise, as errors of ours. Knows their words; knows no model."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from detox_guard.errors import BackboneError, BackboneNotFoundError, DetoxGuardError, InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detox_guard.models.options import LoadOptions

__all__ = ["translated"]


@contextmanager
def translated(source: str, gguf_file: str | None = None, options: LoadOptions | None = None) -> Iterator[None]:
    """Turn what transformers, huggingface_hub, PEFT and safetensors raise into ours, the original chained."""
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
        named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        given = (options and options.model_kwargs) or {}
        if named and named[1] in given:
            bound = "no keyword of transformers' from_pretrained, nor a field of this model's config"
            raise InvalidParamsError(f"model_kwargs.{named[1]}", given[named[1]], bound) from error
        raise BackboneError(
            f"{what}: cannot be loaded: {type(error).__name__}: {line}", hint=_hint_for(error)
        ) from error


def _hint_for(error: Exception) -> str:
    """What to do about an error of transformers."""
    said = str(error)
    if "trust_remote_code" in said:
        return "If you have read and trust the code of this repository, pass trust_remote_code=True."
    if isinstance(error, ImportError):
        named = re.search(r"pip install (?:-U |--upgrade )?[\"']?([A-Za-z][\w.-]*)", said)
        return f"pip install {named[1]}" if named else "Install the package that it names."
    if "offload_folder" in said or "offload_dir" in said:
        return "Some weights go on disk: name a folder for them, offload_folder=…, or leave more memory in max_memory."
    if "GPU" in said or "accelerator" in said or "CUDA" in said:
        return 'This quantization runs on a GPU only; on a CPU take quantization_config="int8" and the plain weights.'
    if "no file named" in said or "does not appear to have a file" in said:
        if "config.json" in said:
            return "Is it a model? Its repository or folder has no config.json."
        return "Weights are read from safetensors or GGUF only; convert pickled .bin weights first."
    return "The file may be damaged or incomplete; fetch it again."
