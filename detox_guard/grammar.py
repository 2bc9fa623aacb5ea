"""What a reply may look like: `Grammar`, a JSON schema, a regular expression or a tool call, as Lark for llguidance.

Knows the grammar language. Knows no tokenizer and no engine (`detox_guard.constraint` compiles), and imports neither
torch nor llguidance.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import TypeAdapter, ValidationError, ValidationInfo, field_validator

from detox_guard.checked import Checked
from detox_guard.errors import InvalidParamsError
from detox_guard.tools import function_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from detox_guard.tools import ToolFormat

__all__ = ["Grammar"]

_SHAPES: dict[str, TypeAdapter[Any]] = {
    "json_schema": TypeAdapter(dict[str, Any]),
    "tool_calls": TypeAdapter(list[tuple[str, dict[str, Any]]]),
}
# The spacing of `json.dumps` and of every chat template, and no other: a small model would else pad for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar(Checked):
    """A language that the reply is held to while it is decoded: `DecodingParams(grammar=Grammar.json_schema(…))`.

    A reply that ends with "stop" is a whole text of the language, whatever the sampling parameters. Shortly before
    `max_new_tokens` it is brought to its end on the shortest way that is found (strings and lists are closed, what is
    required is filled in); where there is none in time, it ends with "length" and is only the beginning of such a text.
    Hashable, comparable and JSON-able. Whether llguidance can enforce it is seen when a request is prepared: what it
    does not implement is refused there (`InvalidParamsError` for `grammar`), never ignored.
    Needs `pip install 'detox-guard[grammar]'`.
    """

    kind: Literal["json_schema", "regex", "tool_calls"]
    body: str
    """A JSON schema; a regular expression; a JSON list of `[name, parameters]`, one for each tool."""

    @field_validator("body")
    @classmethod
    def _fits_its_kind(cls, body: str, info: ValidationInfo) -> str:
        if shape := _SHAPES.get(info.data.get("kind", "")):
            try:
                shape.validate_json(body)
            except ValidationError as error:
                raise ValueError(error.errors(include_url=False)[0]["msg"]) from None
        return body

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Self:
        """JSON that is valid under `schema`, on one line. Raises `InvalidParamsError` if the schema is no JSON object.

        An object that lists its `properties` gets no others, unless the schema speaks of `additionalProperties`.
        """
        return cls(kind="json_schema", body=_dump("schema", schema))

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """The whole reply matches `pattern` (Rust's syntax: no look-around, no back-references)."""
        return cls(kind="regex", body=pattern)

    @classmethod
    def tool_calls(cls, tools: Sequence[Mapping[str, Any]], name: str | None = None) -> Self:
        """Exactly one call of one of the `tools` (OpenAI-style), or of the one called `name`.

        The call is written as the backbone's chat template writes it, so that `parse_tool_calls` reads it.
        Raises `InvalidParamsError` for tools that are none, and for a `name` that is not among them.
        """
        functions = [function_of(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
        offered = [function.name for function in functions]
        if not offered:
            raise InvalidParamsError("tools", list(tools), "at least one tool")
        if name is not None and name not in offered:
            raise InvalidParamsError("name", name, f"one of {', '.join(offered)}")
        wanted = [[f.name, dict(f.parameters)] for f in functions if name in (None, f.name)]
        return cls(kind="tool_calls", body=_dump("tools", wanted))

    def lark(self, tool_format: ToolFormat) -> str:
        """The grammar in llguidance's Lark dialect; `tool_format` is how this backbone writes a tool call."""
        if self.kind == "regex":
            return f"start: /{_lark_pattern(self.body)}/"
        value = _SHAPES[self.kind].validate_json(self.body)
        if self.kind == "json_schema":
            return f"start: {_lark_json(value)}"
        calls = [f"call_{i}" for i in range(len(value))]
        rules = [f"start: {' | '.join(calls)}"]
        for call, (name, parameters) in zip(calls, value, strict=True):
            head, tail = tool_format.around(name)
            rules += [f"{call}: {json.dumps(head)} {call}_arguments {json.dumps(tail)}"]
            # A rule of its own, so that the schema's `$ref`s start from its own root.
            rules += [f"{call}_arguments: {_lark_json(parameters)}"]
        return "\n".join(rules)


def _dump(field: str, value: object) -> str:
    if field == "schema" and not isinstance(value, dict):
        raise InvalidParamsError(field, value, "a dict that holds a JSON schema")
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParamsError(field, value, f"JSON: {error}") from None


def _lark_json(schema: dict[str, Any]) -> str:
    closed = schema if _composes(schema) else _closed(schema)
    return "%json " + json.dumps({**closed, "x-guidance": _SPACING})


def _composes(value: Any) -> bool:
    """Whether an object's properties come from several places, so that no single one may be closed."""
    if isinstance(value, dict):
        if "allOf" in value or ("properties" in value and not value.keys().isdisjoint({"anyOf", "oneOf", "$ref"})):
            return True
        return any(map(_composes, value.values()))
    return isinstance(value, list) and any(map(_composes, value))


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where it lists properties: a small model would invent more."""
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
            out[key] = {name: _closed(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties"):
            out[key] = _closed(value)
        elif key in ("anyOf", "oneOf", "prefixItems") and isinstance(value, list):
            out[key] = [_closed(part) for part in value]
    named, required = schema.get("properties"), schema.get("required", [])
    # A `required` that is no list is llguidance's to refuse.
    known = isinstance(named, dict) and isinstance(required, list) and all(name in [*named] for name in required)
    if known and "patternProperties" not in schema:
        out.setdefault("additionalProperties", False)
    return out


def _lark_pattern(pattern: str) -> str:
    """Slashes and line breaks escaped; what is escaped already stays as it is."""
    written = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return re.sub(r"\\.|[/\n]", lambda m: written.get(m[0], m[0]), pattern, flags=re.DOTALL)
