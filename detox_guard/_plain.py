"""JSON values as callers and models hand them over: bounded, and of plain types. Knows no message and no model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MAX_DEPTH", "as_plain", "decoded", "decoded_whole", "json_fault", "whole_text"]

MAX_DEPTH = 100
"""How deep values may nest: far more than a schema needs, far less than Python's recursion takes."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SURROGATE = re.compile("[\ud800-\udfff]")


def json_fault(value: object) -> str | None:
    """What a value would have to be, to be JSON; None if it is. Never recurses, and ends on a value inside itself."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: dict[int, object] = {}
        for part in level:
            if isinstance(part, Mapping):
                if not all(isinstance(key, str) for key in part):
                    return "JSON, with strings for keys"
                inner |= {id(one): one for one in part.values()}
            elif isinstance(part, list | tuple):
                inner |= {id(one): one for one in part}
            elif part is not None and not isinstance(part, str | int | float):
                return f"JSON, which has no {type(part).__name__}"
        level = list(inner.values())
        if not level:
            return None
    return f"nested at most {MAX_DEPTH} deep"


def as_plain(value: Any) -> Any:
    """A value without a `json_fault`, of dicts, lists and whole texts only."""
    if isinstance(value, Mapping):
        return {whole_text(str(key)): as_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(part) for part in value]
    return whole_text(str.__str__(value)) if isinstance(value, str) else value


def whole_text(text: str) -> str:
    """The text with U+FFFD for each lone surrogate: half a character, which no tokenizer takes."""
    return text if text.isascii() else _SURROGATE.sub(_REPLACEMENT, text)


def _finite(written: str) -> float:
    number = float(written)
    if not math.isfinite(number):
        raise ValueError(f"{written} is no JSON number")
    return number


_DECODER = json.JSONDecoder(strict=False, parse_float=_finite, parse_constant=_finite)


def decoded(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends. Bare line breaks in strings are taken as they stand.

    Raises `ValueError` for anything else, also for what nests too deep and for infinite numbers.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if fault := json_fault(value):
        raise ValueError(fault)
    return as_plain(value), end


def decoded_whole(text: str) -> Any:
    """The JSON value that a text is. Raises `ValueError`."""
    start = len(text) - len(text.lstrip())
    value, end = decoded(text, start)
    if text[end:].strip():
        raise ValueError("more than one value")
    return value
