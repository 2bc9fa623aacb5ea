"""Rows of text from files and hub data sets. Knows formats and bad rows; knows no model and no tokenizer."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from detox_guard._files import usable_path
from detox_guard.detoxifiers.soft_prompt import DataSource
from detox_guard.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["Reply", "Text", "TextPairs", "TextRows", "read_pairs", "read_texts", "whole"]


class Reply(NamedTuple):
    """A text and what it follows."""

    prompt: str
    text: str
    """Continues the prompt, its first space included; or, in a `chat`, answers it as the user's turn."""
    chat: bool = False


Text = str | Reply
_BEFORE = ("prompt", "question")
"""What a row may say its texts follow."""
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")
_SHOWN = 5


@dataclass(frozen=True)
class TextRows:
    """The good rows of one source, in order; `bad` are (line, reason) of those skipped."""

    source: DataSource
    texts: tuple[Text, ...]
    bad: tuple[tuple[int, str], ...]


class _BadRow(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class TextPairs:
    """The good rows of one source of pairs, in order: `(toxic, neutral)`, texts that say the same, or two replies to
    one prompt."""

    source: DataSource
    pairs: tuple[tuple[Text, Text], ...]
    bad: tuple[tuple[int, str], ...]


def whole(text: Text) -> str:
    """All of it that one author wrote: a continuation with its prompt, an answer without the question."""
    return text if isinstance(text, str) else text.text if text.chat else text.prompt + text.text


def read_texts(source: str, *, field: str = "text", max_bad_rows: int = 100, licence: str | None = None) -> TextRows:
    """The texts of a .jsonl, .csv, .tsv or .txt file (one a line), or of a hub data set `org/name[:split]`.

    Where a row has a `prompt`, its text continues that after a space; where it has a `question`, it answers that. What
    the text follows is read before it, where the layout of a batch allows it, and never learned.
    Bad rows (no JSON, `field` missing, no string, empty, not UTF-8) are skipped and counted; blank lines are no rows.
    Raises `DataError` naming the source: not found, of an unknown format, binary, empty, or with more than
    `max_bad_rows` bad rows, of which it gives the first line numbers and reasons.
    """
    rows, name, digest = _read(source, (field,), optional=tuple(name for name in _BEFORE if name != field))
    texts = tuple(_replies(row, field)[0] for _, row in rows if isinstance(row, dict))
    return TextRows(_source(source, name, digest, rows, max_bad_rows, licence), texts, _bad(rows))


def read_pairs(source: str, *, max_bad_rows: int = 100, licence: str | None = None) -> TextPairs:
    """The `toxic` and `neutral` texts of each row (of a list of neutral ones the first), with `prompt` and `question`
    as in `read_texts`, which see."""
    rows, name, digest = _read(source, ("toxic", "neutral"), optional=_BEFORE)
    pairs = tuple(_replies(row, "toxic", "neutral") for _, row in rows if isinstance(row, dict))
    return TextPairs(_source(source, name, digest, rows, max_bad_rows, licence), pairs, _bad(rows))


def _replies(row: dict[str, str], *fields: str) -> tuple[Any, ...]:
    """The texts at these fields, each behind what the row says that it follows."""
    if "question" in row:
        return tuple(Reply(row["question"], row[field], chat=True) for field in fields)
    if "prompt" in row:
        return tuple(Reply(row["prompt"], f" {row[field]}") for field in fields)
    return tuple(row[field] for field in fields)


_Row = dict[str, str] | _BadRow
"""The texts of one row by field: all that are asked for, and the optional ones that are good."""
_Rows = list[tuple[int, _Row]]


def _read(source: str, fields: tuple[str, ...], optional: tuple[str, ...] = ()) -> tuple[_Rows, str, str]:
    """The rows, the source's name for the card, and its SHA-256."""
    path, source = usable_path(source), str(source)
    hub_id = _HUB_ID.fullmatch(source)
    if path.exists() or path.suffix.lower() in _READERS or not hub_id:
        raw, digest = _read_file(path, fields)
        return [(line, _checked_row(row, fields, optional)) for line, row in raw], path.name, digest
    columns = _read_hub(hub_id["name"], hub_id["split"] or "train", fields, optional)
    rows = [
        (line, _checked_row(dict(zip(columns, values, strict=True)), fields, optional))
        for line, values in enumerate(zip(*columns.values(), strict=True), start=1)
    ]
    return rows, source, _sha256("\n".join("\n".join(row.values()) for _, row in rows if isinstance(row, dict)))


def _bad(rows: _Rows) -> tuple[tuple[int, str], ...]:
    return tuple((line, str(row)) for line, row in rows if isinstance(row, _BadRow))


def _source(source: str, name: str, digest: str, rows: _Rows, most: int, licence: str | None) -> DataSource:
    """What the card says of it. Raises `DataError` where too little of it is good."""
    bad = _bad(rows)
    listed = "; ".join(f"line {line}: {reason}" for line, reason in bad[:_SHOWN])
    if len(bad) > most:
        raise DataError(f"{source}: {len(bad)} bad rows, {most} allowed: {listed}")
    if len(bad) == len(rows):
        raise DataError(f"{source}: no usable row in it" + (f": {listed}" if listed else ""))
    return DataSource(name=name, sha256=digest, rows=len(rows) - len(bad), licence=licence)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checked_row(row: dict[str, Any] | _BadRow, fields: tuple[str, ...], optional: tuple[str, ...]) -> _Row:
    if isinstance(row, _BadRow):
        return row
    texts: dict[str, str] = {}
    for field in (*fields, *(name for name in optional if name in row)):
        text = _checked(row[field], field)
        if isinstance(text, str):
            texts[field] = text
        elif field not in optional:
            return text
    return texts


def _checked(value: object, field: str) -> str | _BadRow:
    if field == "neutral" and isinstance(value, list) and value:
        value = value[0]  # ParaDetox has up to three rewrites
    if isinstance(value, dict):
        value = value.get("text", value)  # RealToxicityPrompts has scores beside the text
    if not isinstance(value, str):
        return _BadRow(f"{field!r} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # surrogateescape's, or a lone surrogate in JSON
        return _BadRow("not valid UTF-8")
    return value.strip() or _BadRow(f"{field!r} is empty")


_Raw = tuple[int, "dict[str, Any] | _BadRow"]


def _read_file(path: Path, fields: tuple[str, ...]) -> tuple[list[_Raw], str]:
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
        return list(reader(text, fields)), hashlib.sha256(content).hexdigest()
    except csv.Error as error:
        raise DataError(f"{path}: not readable as CSV: {error}") from error
    except _BadRow as error:
        raise DataError(f"{path}: {error}") from None


def _jsonl(text: str, fields: tuple[str, ...]) -> Iterator[_Raw]:
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
        else:
            lacking = next((field for field in fields if field not in row), None)
            yield number, row if lacking is None else _BadRow(f"no {lacking!r}")


def _table(delimiter: str, text: str, fields: tuple[str, ...]) -> Iterator[_Raw]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for field in fields:
        if reader.fieldnames is not None and field not in reader.fieldnames:
            raise _BadRow(f"no column {field!r}; it has {', '.join(map(repr, reader.fieldnames))}")
    for row in reader:
        lacking = next((field for field in fields if row[field] is None), None)
        yield reader.line_num, row if lacking is None else _BadRow(f"no {lacking!r}")


def _csv(text: str, fields: tuple[str, ...]) -> Iterator[_Raw]:
    return _table(",", text, fields)


def _tsv(text: str, fields: tuple[str, ...]) -> Iterator[_Raw]:
    return _table("\t", text, fields)


def _txt(text: str, fields: tuple[str, ...]) -> Iterator[_Raw]:
    if len(fields) > 1:
        raise _BadRow(f"plain text has no {' and '.join(fields)}; a .jsonl, .csv or .tsv file has")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {fields[0]: line}


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _tsv, ".txt": _txt}


def _read_hub(name: str, split: str, fields: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Iterable[Any]]:
    """The columns of these fields, and the optional ones that the set has."""
    import datasets

    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library has no common root for what a fetch can raise
        raise DataError(
            f"{name}:{split}: cannot be fetched: {error}", hint="a local file, or a hub data set org/name[:split]"
        ) from error
    columns: dict[str, Iterable[Any]] = {}
    for field in (*fields, *optional):
        try:
            columns[field] = found[field]
        except KeyError:
            if field not in optional:
                raise DataError(f"{name}:{split}: no column {field!r}") from None
    return columns
