"""Files that are read and written whole or not at all, names that no file system takes, and folders that are known to
be writable before long work."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard.errors import DataError, DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "hold_folder",
    "prepare_file",
    "prepare_folder",
    "read_json",
    "read_regular",
    "read_text",
    "sync",
    "usable_path",
    "write_whole",
]


def usable_path(name: object, wrong: type[DetoxGuardError] = DataError) -> Path:
    """The path that a user named, `~` expanded; whether there is anything is not asked.

    Raises `wrong` for what is no path (a number, bytes) and for names that no file system has: too long, with a NUL,
    with half a character, of a user that is not there.
    """
    shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:79]}…"
    if not isinstance(name, str | os.PathLike):
        raise wrong(f"{shown}: not a name or a path")
    try:
        path = Path(name).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except OSError as error:
        raise wrong(f"{shown}: no such file or folder: {error.strerror or error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise wrong(f"{shown}: no name of a file or folder: {error}") from error
    return path


def prepare_folder(folder: Path) -> None:
    """Make `folder` unless it is there, and see that it can be written: before hours of work, not after.

    Raises `DataError`.
    """
    folder = usable_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error}") from error


@contextmanager
def hold_folder(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder, made unless it is there, against every other process that would. `doing` says what for, in the
    words of the refusal. Raises `DataError` while another holds it."""
    from filelock import FileLock, Timeout

    prepare_folder(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(f"{folder}: another process is {doing}", hint="wait for it, or name another folder") from None
    try:
        yield
    finally:
        lock.release()


def prepare_file(path: Path) -> None:
    """`prepare_folder` for the folder of a file. Raises `DataError`."""
    prepare_folder(_place(path).parent)


def read_text(path: Path) -> str:
    """A whole UTF-8 file, without its byte order mark. Raises `DataError`."""
    path = usable_path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `DataError`, also for JSON that is nested too deep."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes, opened without waiting: a pipe, a device or a link is
    refused, also one that was put there a moment ago. Raises `DataError`."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        if path.is_symlink():
            raise DataError(f"{path}: a link, not a file")
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{path}: not a regular file")
            content = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(content) > most:
        raise DataError(f"{path}: larger than {most} bytes")
    return content


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` so that a reader finds the old content or the new one, never a part, also after a power cut.

    Raises `DataError`.
    """
    path, name = _place(path), None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=".new-", delete=False) as file:
            name = file.name
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is private; this one is the user's
        os.replace(name, path)
    except (OSError, UnicodeEncodeError) as error:
        raise DataError(f"{path}: cannot be written: {error}") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """See that a file, or a folder's list of names, is on the disk and not only in memory. Raises `OSError`."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    # Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _place(path: Path) -> Path:
    """Where a link leads; what is there already must be a file, since it will be replaced. Raises `DataError`."""
    try:
        path = usable_path(path).resolve()
        there = path.exists() and not path.is_file()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise DataError(f"{path}: cannot be written: {error}") from error
    if there:
        raise DataError(f"{path}: cannot be written: it is no file")
    return path
