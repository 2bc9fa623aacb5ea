"""Rows of text from files and hub data sets. Knows formats and bad rows; knows no model and no tokenizer."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detox_guard.detoxifier import DataSource
from detox_guard.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Text", "TextPairs", "TextRows", "read_pairs", "read_texts"]

Text = str | tuple[str, str]
"""A text, or the prompt and the reply that it is made of."""
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")
_SHOWN = 5


@dataclass(frozen=True)
class TextRows:
    """The good rows of one source, in order; `bad` are (line, reason) of those skipped."""

    source: DataSource
    texts: tuple[str, ...]
    bad: tuple[tuple[int, str], ...]


class _BadRow(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class TextPairs:
    """The good rows of one source of pairs, in order: `(toxic, neutral)`, texts that say the same, or `(prompt, reply)`
    twice with two replies to one prompt."""

    source: DataSource
    pairs: tuple[tuple[Text, Text], ...]
    bad: tuple[tuple[int, str], ...]


def read_texts(source: str, *, field: str = "text", max_bad_rows: int = 100, licence: str | None = None) -> TextRows:
    """The texts of a .jsonl, .csv, .tsv or .txt file (one a line), or of a hub data set `org/name[:split]`.

    Bad rows (no JSON, `field` missing, no string, empty, not UTF-8) are skipped and counted; blank lines are no rows.
    Raises `DataError` naming the source: not found, of an unknown format, binary, empty, or with more than
    `max_bad_rows` bad rows, of which it gives the first line numbers and reasons.
    """
    (rows,), name, digest = _read(source, (field,))
    texts = tuple(row for _, row in rows if isinstance(row, str))
    bad = tuple((line, str(row)) for line, row in rows if isinstance(row, _BadRow))
    return TextRows(_source(source, name, digest, len(texts), bad, max_bad_rows, licence), texts, bad)


def read_pairs(source: str, *, max_bad_rows: int = 100, licence: str | None = None) -> TextPairs:
    """The `toxic` and `neutral` texts of each row (of a list of neutral ones the first). Where it has a `prompt`, they
    continue that after a space. As `read_texts`, which see."""
    (toxic, neutral), name, digest = _read(source, ("toxic", "neutral"))
    try:
        (prompts,), _, _ = _read(source, ("prompt",))
    except DataError:  # a table without that column
        prompts = [(line, _BadRow("no prompt")) for line, _ in toxic]
    pairs: list[tuple[Text, Text]] = []
    bad = []
    for (line, one), (_, other), (_, prompt) in zip(toxic, neutral, prompts, strict=True):
        wrong = next((text for text in (one, other) if isinstance(text, _BadRow)), None)
        if wrong is not None:
            bad.append((line, str(wrong)))
        elif isinstance(prompt, str):
            pairs.append(((prompt, f" {one}"), (prompt, f" {other}")))
        else:
            pairs.append((str(one), str(other)))
    return TextPairs(_source(source, name, digest, len(pairs), bad, max_bad_rows, licence), tuple(pairs), tuple(bad))


def _read(source: str, fields: tuple[str, ...]) -> tuple[list[_Rows], str, str]:
    """The rows of each field, the source's name for the card, and its SHA-256."""
    path = Path(source)
    hub_id = _HUB_ID.fullmatch(source)
    if path.exists() or path.suffix.lower() in _READERS or not hub_id:
        found = [_read_file(path, field) for field in fields]
        name = path.name
    else:
        found = [_read_hub(hub_id["name"], hub_id["split"] or "train", field) for field in fields]
        name = source
    digests = list(dict.fromkeys(digest for _, digest in found))
    return [rows for rows, _ in found], name, digests[0] if len(digests) == 1 else _sha256("".join(digests))


def _source(
    source: str, name: str, digest: str, rows: int, bad: Sequence[tuple[int, str]], most: int, licence: str | None
) -> DataSource:
    """What the card says of it. Raises `DataError` where too little of it is good."""
    listed = "; ".join(f"line {line}: {reason}" for line, reason in bad[:_SHOWN])
    if len(bad) > most:
        raise DataError(f"{source}: {len(bad)} bad rows, {most} allowed: {listed}")
    if not rows:
        raise DataError(f"{source}: no usable row in it" + (f": {listed}" if listed else ""))
    return DataSource(name=name, sha256=digest, rows=rows, licence=licence)


_Rows = list[tuple[int, "str | _BadRow"]]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(value: object, field: str) -> str | _BadRow:
    if field == "neutral" and isinstance(value, list) and value:
        value = value[0]  # ParaDetox has up to three rewrites
    if not isinstance(value, str):
        return _BadRow(f"{field!r} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # surrogateescape's, or a lone surrogate in JSON
        return _BadRow("not valid UTF-8")
    return value.strip() or _BadRow(f"{field!r} is empty")


def _read_file(path: Path, field: str) -> tuple[_Rows, str]:
    reader = _READERS.get(path.suffix.lower())
    if not path.exists():
        raise DataError(
            f"{path}: no such file", hint="a .jsonl, .csv, .tsv or .txt file, or a hub set org/name[:split]"
        )
    if reader is None or not path.is_file():
        raise DataError(f"{path}: not a .jsonl, .csv, .tsv or .txt file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if b"\0" in content:
        raise DataError(f"{path}: a binary file, not text")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    try:
        return list(reader(text, field)), hashlib.sha256(content).hexdigest()
    except csv.Error as error:
        raise DataError(f"{path}: not readable as CSV: {error}") from error
    except _BadRow as error:
        raise DataError(f"{path}: {error}") from None


def _jsonl(text: str, field: str) -> Iterator[tuple[int, str | _BadRow]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, _BadRow(f"not JSON ({error})")
            continue
        if not isinstance(row, dict):
            yield number, _BadRow("not a JSON object")
        elif field not in row:
            yield number, _BadRow(f"no {field!r}")
        else:
            yield number, _checked(row[field], field)


def _table(delimiter: str, text: str, field: str) -> Iterator[tuple[int, str | _BadRow]]:
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    if reader.fieldnames is not None and field not in reader.fieldnames:
        raise _BadRow(f"no column {field!r}; it has {', '.join(map(repr, reader.fieldnames))}")
    for row in reader:
        value = row[field]
        yield reader.line_num, _BadRow(f"no {field!r}") if value is None else _checked(value, field)


def _csv(text: str, field: str) -> Iterator[tuple[int, str | _BadRow]]:
    return _table(",", text, field)


def _tsv(text: str, field: str) -> Iterator[tuple[int, str | _BadRow]]:
    return _table("\t", text, field)


def _txt(text: str, field: str) -> Iterator[tuple[int, str | _BadRow]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _checked(line, "line")


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _tsv, ".txt": _txt}


def _read_hub(name: str, split: str, field: str) -> tuple[_Rows, str]:
    import datasets

    try:
        column = datasets.load_dataset(name, split=split)[field]
    except KeyError:
        raise DataError(f"{name}:{split}: no column {field!r}") from None
    except Exception as error:  # the library has no common root for what a fetch can raise
        raise DataError(
            f"{name}:{split}: cannot be fetched: {error}", hint="a local file, or a hub data set org/name[:split]"
        ) from error
    rows: _Rows = [(number, _checked(value, field)) for number, value in enumerate(column, start=1)]
    return rows, _sha256("\n".join(row for _, row in rows if isinstance(row, str)))
