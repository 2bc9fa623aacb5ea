"""Rows of text from files, pipes and hub data sets: the one reader.

Knows formats, and where a row stands; knows no model, and not what is wanted of a row.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from detox_guard._files import usable_path
from detox_guard.errors import DataError, DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["BadRow", "Row", "Rows", "parse_rows", "read_rows", "text_at"]

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")
_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_FORMATS = "a .jsonl, .json, .csv, .tsv or .txt file, packed as .gz or not"


class BadRow(Exception):
    """Why one row cannot be used."""


class Row(NamedTuple):
    """One row: an object's or a table's fields, or the line of a plain text; or `bad`, the reason why it is none."""

    number: int
    value: Any
    bad: str = ""


@dataclass(frozen=True)
class Rows:
    """What a source holds, in order. `unit` is what `Row.number` counts, from 1: a file's lines, or rows."""

    source: str
    rows: list[Row]
    unit: str = "line"
    sha256: str = ""
    """Of a file's bytes; empty for a pipe and for a hub data set."""
    columns: tuple[str, ...] | None = None
    """Those of a table or a hub data set, where it has any."""

    def where(self, row: Row) -> str:
        """Words for where a row stands."""
        return f"{self.source}: {self.unit} {row.number}"

    def good(self, hint: str = "") -> Iterator[tuple[str, Any]]:
        """Each row's place and value. Raises `DataError` at the first bad row."""
        for row in self.rows:
            if row.bad:
                raise DataError(f"{self.where(row)}: {row.bad}", hint=hint)
            yield self.where(row), row.value

    def require(self, fields: Sequence[str]) -> None:
        """Raise `DataError` where a table lacks one of these columns, and where plain text would have to have two."""
        lacking = [name for name in fields if self.columns is not None and name not in self.columns]
        if lacking:
            raise DataError(
                f"{self.source}: no column {lacking[0]!r}; it has {', '.join(map(repr, self.columns or ()))}"
            )
        if len(fields) > 1 and any(isinstance(row.value, str) for row in self.rows):
            raise DataError(f"{self.source}: plain text has no {' and '.join(fields)}; a .jsonl, .csv or .tsv file has")


def read_rows(source: object, *, other: str | None = None) -> Rows:
    """The rows of a .jsonl, .json (a list, or one object), .csv, .tsv or .txt file, `.gz` behind it or not, or of a
    hub data set `org/name[:split]`.

    A row that is no JSON, or no UTF-8, is `bad`; blank lines are no rows. `other` is the format of files by other
    names. Raises `DataError` for what is missing, of an unknown format, binary, or no table, and `DetoxGuardError`
    without the package `datasets`, which the hub needs.
    """
    path = usable_path(source)
    kind = path.suffix.lower()
    hub = _HUB_ID.fullmatch(str(source))
    if hub and not path.exists() and kind not in (*_KINDS, ".gz"):
        return _from_hub(str(source), hub["name"], hub["split"] or "train")
    if not path.exists():
        raise DataError(f"{path}: no such file", hint=f"{_FORMATS}, or a hub data set org/name[:split]")
    plain = path.with_suffix("").suffix.lower() if kind == ".gz" else kind
    if (plain not in _KINDS and other is None) or not path.is_file():
        raise DataError(f"{path}: not {_FORMATS}")
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if kind == ".gz" else content
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return parse_rows(text, str(path), plain if plain in _KINDS else other, hashlib.sha256(content).hexdigest())


def parse_rows(content: bytes, name: str, kind: str | None = None, sha256: str = "") -> Rows:
    """The rows of a file's or a pipe's bytes; `kind` is a suffix. None is JSON lines where the first line is an object,
    else plain text. Raises `DataError`."""
    if b"\0" in content:
        raise DataError(f"{name}: a binary file, not text")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if kind is None:
        kind = ".jsonl" if isinstance(next(_jsonl(text), Row(0, None)).value, dict) else ".txt"
    try:
        if kind in (".csv", ".tsv"):
            table = csv.DictReader(
                io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",", strict=True
            )
            rows = [Row(table.line_num, row) for row in table]
            return Rows(name, rows, sha256=sha256, columns=tuple(table.fieldnames) if table.fieldnames else None)
        if kind == ".json":
            found = json.loads(text)
            values = found if isinstance(found, list) else [found]
            return Rows(name, [Row(number, value) for number, value in enumerate(values, 1)], "row", sha256)
    except csv.Error as error:
        raise DataError(f"{name}: not readable as CSV: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON: {error}") from error
    return Rows(name, list((_txt if kind == ".txt" else _jsonl)(text)), sha256=sha256)


def text_at(row: Any, field: str) -> str:
    """The text of a row's field, or of the `text` inside it, where RealToxicityPrompts has scores beside it; of a plain
    line, the line. Stripped. Raises `BadRow` for what is absent, empty, or no text."""
    if not isinstance(row, dict | str):
        raise BadRow("not a JSON object")
    value = row if isinstance(row, str) else row.get(field)
    if isinstance(value, dict):
        value = value.get("text", value)
    if value is None:
        raise BadRow(f"no {field!r}")
    if not isinstance(value, str):
        raise BadRow(f"{field!r} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # surrogateescape's, or a lone surrogate in JSON
        raise BadRow("not valid UTF-8") from None
    if not value.strip():
        raise BadRow(f"{field!r} is empty")
    return value.strip()


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a form feed or U+2028 inside a text ends no line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _jsonl(text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        try:
            yield Row(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield Row(number, None, f"not JSON ({error})")


def _txt(text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        bad = "not valid UTF-8" if any("\ud800" <= char <= "\udfff" for char in line) else ""
        yield Row(number, line, bad)


def _from_hub(source: str, name: str, split: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise DetoxGuardError(
            f"{source}: a hub data set needs the package datasets",
            hint="pip install 'detox-guard[train]' or 'detox-guard[eval]', or give a local file",
        ) from error
    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library has no common root for what a fetch can raise
        raise DataError(
            f"{name}:{split}: cannot be fetched: {error}", hint=f"{_FORMATS}, or org/name[:split]"
        ) from error
    rows = [Row(number, row) for number, row in enumerate(found, start=1)]
    return Rows(source, rows, "row", columns=tuple(found.column_names))
