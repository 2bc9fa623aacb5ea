"""The detoxifiers that were trained on this machine, one a base model. Knows folders; trains and serves nothing.

They lie in the user's cache, under the base's id, revision and shape::

    detoxifiers/qwen3-0.6b-1f0c….json             the entry: which base, and which folder holds its detoxifier
    detoxifiers/qwen3-0.6b-1f0c…/9f86d081884c/    that folder, in PEFT's format, named after its weights

An entry is written last and in one go. So a process that is killed leaves the old detoxifier, or the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from detox_guard._files import read_regular, write_whole
from detox_guard.detoxifiers.soft_prompt import Detoxifier, last_part
from detox_guard.errors import BackboneError, DataError, DetoxifierError, DetoxifierNotFoundError
from detox_guard.models.cache import cache_dir
from detox_guard.models.checks import CONFIG_FILE

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

__all__ = ["Entry", "entries", "find", "register", "remove"]

_log = logging.getLogger("detox_guard.detoxifiers")
_README = "README.md"
_MOST_BYTES = 2**20


class Entry(BaseModel):
    """One detoxifier that was trained here, and the base it is for."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    """What `remove` takes: the base's last name and a digest of all that it is looked up by."""
    base_id: str
    base_revision: str | None
    hidden_size: int
    num_layers: int
    virtual_tokens: int
    sha256: str
    """Of the soft prompt, as `Detoxifier.sha256`."""
    registered: str
    """When, in UTC: ISO 8601."""

    @property
    def folder(self) -> Path:
        """Where its files lie: what `Detoxifier.load` takes."""
        return _room() / self.name / self.sha256[:12]


def register(folder: str | Path, backbone: Backbone) -> Entry:
    """Copy the detoxifier in `folder` (and its README.md) into the cache, for `find` with the same backbone.

    It takes the place of one that was registered for this base before. Raises `DetoxifierError` where it is no
    detoxifier for this backbone, or where the cache cannot be written.
    """
    detoxifier = Detoxifier.load(folder)
    detoxifier.validate(backbone)
    entry = Entry(
        name=_name(backbone),
        base_id=backbone.id,
        base_revision=backbone.revision,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
        virtual_tokens=detoxifier.card.virtual_tokens,
        sha256=detoxifier.sha256,
        registered=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    from filelock import FileLock

    try:
        room = _room()
        (room / entry.name).mkdir(parents=True, exist_ok=True)
        with FileLock(room / f"{entry.name}.lock"):
            readme = Path(folder).expanduser() / _README
            if readme.is_file():
                write_whole(_made(entry.folder) / _README, read_regular(readme, _MOST_BYTES))
            detoxifier.save(entry.folder)
            write_whole(room / f"{entry.name}.json", entry.model_dump_json(indent=2) + "\n")
            for old in (room / entry.name).iterdir():
                if old != entry.folder:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, BackboneError, DataError) as error:
        raise DetoxifierError(f"the detoxifier cannot be registered: {error}") from error
    return entry


def find(backbone: Backbone) -> Path | None:
    """The folder of the detoxifier that was trained here for this very base: id, revision and shape. None: there is
    none, or none that is whole."""
    try:
        entry = _read(_room() / f"{_name(backbone)}.json")
    except BackboneError:  # no cache: nothing was registered
        return None
    return None if entry is None else entry.folder


def entries() -> list[Entry]:
    """All that are whole, by name. What is damaged is named in the log and left out."""
    room = _room()
    found = (_read(file) for file in sorted(room.glob("*.json"))) if room.is_dir() else ()
    return [entry for entry in found if entry is not None]


def remove(name: str) -> None:
    """Forget one, whole or damaged. Raises `DetoxifierNotFoundError` for a name that is not there."""
    room = _room()
    known = [file.stem for file in room.glob("*.json")] if room.is_dir() else []
    if name not in known:
        raise DetoxifierNotFoundError(
            f"{name}: no detoxifier of that name was registered",
            hint=f"registered: {', '.join(sorted(known)) or 'none'}",
        )
    try:
        (room / f"{name}.json").unlink(missing_ok=True)  # first: a folder without an entry is nobody's
        shutil.rmtree(room / name, ignore_errors=True)
    except OSError as error:
        raise DetoxifierError(f"{name}: cannot be removed: {error}") from error


def _room() -> Path:
    return cache_dir() / "detoxifiers"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _name(backbone: Backbone) -> str:
    base = last_part(backbone.id)
    parts = json.dumps([base, backbone.revision, backbone.hidden_size, backbone.num_layers])
    readable = re.sub(r"[^a-z0-9._-]+", "-", base).strip(".-")[:60] or "model"
    return f"{readable}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def _read(file: Path) -> Entry | None:
    """The entry in a file, if it and what it points to are there."""
    if not file.exists():
        return None
    try:
        entry = Entry.model_validate_json(read_regular(file, _MOST_BYTES))
    except (DataError, ValidationError, ValueError) as error:
        _log.warning("a registered detoxifier is passed over: %s: %s", file, str(error).splitlines()[0])
        return None
    if entry.name != file.stem or not (entry.folder / CONFIG_FILE).is_file():
        _log.warning("a registered detoxifier is passed over: %s: its folder is not whole", file)
        return None
    return entry
