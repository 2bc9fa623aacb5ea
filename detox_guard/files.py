"""Files that are read and written whole or not at all, and folders that are known to be writable before long work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from detox_guard.errors import DataError

__all__ = ["prepare_file", "prepare_folder", "read_text", "write_whole"]


def prepare_folder(folder: Path) -> None:
    """Make `folder` unless it is there, and see that it can be written: before hours of work, not after.

    Raises `DataError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error}") from error


def prepare_file(path: Path) -> None:
    """`prepare_folder` for the folder of a file. Raises `DataError`."""
    prepare_folder(_place(path).parent)


def read_text(path: Path) -> str:
    """A whole UTF-8 file, without its byte order mark. Raises `DataError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` so that a reader finds the old content or the new one, never a part. Raises `DataError`."""
    path, name = _place(path), None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            name = file.name
            file.write(content.encode() if isinstance(content, str) else content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is private; this one is the user's
        os.replace(name, path)
    except (OSError, UnicodeEncodeError) as error:
        raise DataError(f"{path}: cannot be written: {error}") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def _place(path: Path) -> Path:
    """Where a link leads; what is there already must be a file, since it will be replaced. Raises `DataError`."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: cannot be written: it is no file")
    return path
