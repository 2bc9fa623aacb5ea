"""Rows that survive a kill: appended to a journal during the work, written whole once it is done. Knows no figures."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any, Self

from detox_guard._files import write_whole
from detox_guard.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["Journal"]

Key = tuple[Any, ...]
FLUSH_S = 1.0


class Journal:
    """Rows by `key` fields. `path` holds a finished set, `path.part` what was added since; both are read at the start.

    A line cut off by a kill is dropped, so its row is simply made again; a row is kept once. Not for two processes at
    once: the caller holds the lock. Raises `DataError`.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self._fields = path, key
        self._part = path.with_name(path.name + ".part")
        self.rows: dict[Key, dict[str, Any]] = {}
        for row in [*self._read(self.path), *self._read(self._part)]:
            self.rows.setdefault(self._key(row), row)
        self._file: Any = None
        self._waiting: list[str] = []
        self._flushed_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __contains__(self, key: Key) -> bool:
        return key in self.rows

    def add(self, row: dict[str, Any]) -> None:
        """Take one row; it is on the disk within a second of work, or at `flush`."""
        self.rows[self._key(row)] = row
        self._waiting.append(_line(row))
        if time.monotonic() - self._flushed_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Append what waits, one write for all, on the disk when this returns."""
        if not self._waiting:
            return
        try:
            if self._file is None:
                self._file = self._part.open("a+b")
                self._cut()
            self._file.write("".join(self._waiting).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self._part}: cannot be written: {error}") from error
        self._waiting.clear()
        self._flushed_s = time.monotonic()

    def finish(self) -> None:
        """Write all rows, sorted by key, as one whole file; the journal goes."""
        self.__exit__()
        if self._part.exists() or not self.path.exists():
            write_whole(self.path, "".join(_line(self.rows[key]) for key in sorted(self.rows)))
            self._part.unlink(missing_ok=True)

    def _key(self, row: Mapping[str, Any]) -> Key:
        try:
            return tuple(row[field] for field in self._fields)
        except (KeyError, TypeError):
            raise DataError(
                f"{self.path}: a row without {', '.join(self._fields)}", hint="is it of this run?"
            ) from None

    def _read(self, path: Path) -> Iterator[dict[str, Any]]:
        if not path.exists():
            return
        *lines, torn = path.read_bytes().split(b"\n")
        if torn and path == self.path:
            raise DataError(f"{path}: its last line is cut off", hint="it was written whole; restore it or start again")
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number}: not JSON ({error})") from error

    def _cut(self) -> None:
        """Drop the line that a kill cut off, so that the next one starts fresh."""
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
