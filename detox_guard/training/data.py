"""Texts and pairs of texts to learn from. Knows which fields a row must have, and how many bad rows are too many; the
formats are `detox_guard.data`'s. Knows no model and no tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from detox_guard.data import BadRow, read_rows, text_at
from detox_guard.detoxifiers.card import DataSource
from detox_guard.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Prompted", "Text", "TextPairs", "TextRows", "read_pairs", "read_texts", "whole"]


class Prompted(NamedTuple):
    """A text and what it follows."""

    prompt: str
    text: str
    """Continues the prompt, its first space included; or, in a `chat`, answers it as the user's turn."""
    chat: bool = False


Text = str | Prompted
_BEFORE = ("prompt", "question")
"""What a row may say its texts follow."""
_SHOWN = 5
_Bad = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class TextRows:
    """The good rows of one source, in order; `bad` are (line, reason) of those skipped."""

    source: DataSource
    texts: tuple[Text, ...]
    bad: _Bad


@dataclass(frozen=True)
class TextPairs:
    """The good rows of one source of pairs, in order: `(toxic, neutral)`, texts that say the same, or two replies to
    one prompt."""

    source: DataSource
    pairs: tuple[tuple[Text, Text], ...]
    bad: _Bad


def whole(text: Text) -> str:
    """All of it that one author wrote: a continuation with its prompt, an answer without the question."""
    return text if isinstance(text, str) else text.text if text.chat else text.prompt + text.text


def read_texts(source: str, *, field: str = "text", max_bad_rows: int = 100, licence: str | None = None) -> TextRows:
    """The texts at `field` of a source that `detox_guard.data.read_rows` reads.

    Where a row has a `prompt`, its text continues that after a space; where it has a `question`, it answers that. What
    the text follows is read before it, where the layout of a batch allows it, and never learned.
    Bad rows (`field` missing, no string, empty, not UTF-8) are skipped and counted. Raises `DataError` naming the
    source for more than `max_bad_rows` of them, with the first line numbers and reasons, and where none is good.
    """
    found, rows, bad = _read(source, (field,), max_bad_rows, licence)
    return TextRows(found, tuple(one for (one,) in rows), bad)


def read_pairs(source: str, *, max_bad_rows: int = 100, licence: str | None = None) -> TextPairs:
    """The `toxic` and `neutral` texts of each row (of a list of neutral ones the first), with `prompt` and `question`
    as in `read_texts`, which see."""
    found, rows, bad = _read(source, ("toxic", "neutral"), max_bad_rows, licence)
    return TextPairs(found, tuple((toxic, neutral) for toxic, neutral in rows), bad)


def _read(
    source: str, fields: Sequence[str], most: int, licence: str | None
) -> tuple[DataSource, list[tuple[Text, ...]], _Bad]:
    found = read_rows(source)
    found.require(fields)
    good: list[dict[str, str]] = []
    bad: list[tuple[int, str]] = []
    for row in found.rows:
        try:
            if row.bad:
                raise BadRow(row.bad)
            good.append(_texts(row.value, fields))
        except BadRow as reason:
            bad.append((row.number, str(reason)))
    listed = "; ".join(f"{found.unit} {number}: {reason}" for number, reason in bad[:_SHOWN])
    if len(bad) > most:
        raise DataError(f"{source}: {len(bad)} bad rows, {most} allowed: {listed}")
    if not good:
        raise DataError(f"{source}: no usable row in it" + (f": {listed}" if listed else ""))
    name = Path(source).name if found.sha256 else source
    sha256 = found.sha256 or hashlib.sha256("\n".join("\n".join(row.values()) for row in good).encode()).hexdigest()
    about = DataSource(name=name, sha256=sha256, rows=len(good), licence=licence)
    return about, [_replies(row, fields) for row in good], tuple(bad)


def _texts(row: Any, fields: Sequence[str]) -> dict[str, str]:
    """The texts of one row by field: all that are asked for, and what they follow, where that is good."""
    if isinstance(row, dict) and isinstance(several := row.get("neutral"), list) and several:
        row = {**row, "neutral": several[0]}  # ParaDetox has up to three rewrites
    texts = {field: text_at(row, field) for field in fields}
    for name in _BEFORE:
        if name not in texts and isinstance(row, dict):
            try:
                texts[name] = text_at(row, name)
            except BadRow:
                continue
    return texts


def _replies(row: dict[str, str], fields: Sequence[str]) -> tuple[Text, ...]:
    """The texts at these fields, each behind what the row says that it follows."""
    if "question" in row and "question" not in fields:
        return tuple(Prompted(row["question"], row[field], chat=True) for field in fields)
    if "prompt" in row and "prompt" not in fields:
        return tuple(Prompted(row["prompt"], f" {row[field]}") for field in fields)
    return tuple(row[field] for field in fields)
