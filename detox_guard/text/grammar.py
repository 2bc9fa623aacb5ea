"""What a reply may look like: `Grammar`, a JSON schema, a regular expression or a tool call, as Lark for llguidance.

Knows the grammar language. Knows no tokenizer and no engine (`text.llguidance` compiles), and imports neither
torch nor llguidance.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import TypeAdapter, ValidationError, ValidationInfo, field_validator

from detox_guard._strict import StrictModel
from detox_guard.errors import InvalidParamsError
from detox_guard.text.tools import function_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from detox_guard.text.tools import ToolFormat

__all__ = ["Grammar"]

_SHAPES: dict[str, TypeAdapter[Any]] = {
    "json_schema": TypeAdapter(dict[str, Any]),
    "tool_calls": TypeAdapter(list[tuple[str, dict[str, Any]]]),
}
# The spacing of `json.dumps` and of every chat template, and no other: a small model would else pad for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


_MAX_DEPTH = 120
"""Levels of JSON; a little more is llguidance's own bound."""
_MORE = "additionalProperties"
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
_SINGLE = {"items", _MORE, "additionalItems", "contains", "propertyNames", "not", "if", "then", "else"}
_FORMATS = {"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
_NAME_KEYWORDS = {"enum", "const", "pattern", "minLength", "maxLength"}
_NARROWING = {
    "uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "dependentRequired",
    "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems", "propertyNames",
}  # fmt: skip
_IDLE: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False, None), "dependentRequired": ({},), "dependentSchemas": ({},), "dependencies": ({},),
    "unevaluatedProperties": (True, {}), "unevaluatedItems": (True, {}), "propertyNames": (True, {}),
}  # fmt: skip
"""Values that assert nothing."""
_IDLE_WITHOUT = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
"""Keywords that assert nothing without another."""
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]|\\[1-9]")


class Grammar(StrictModel):
    """A language that the reply is held to while it is decoded: `DecodingParams(grammar=Grammar.json_schema(…))`.

    A reply that ends with "stop" is a whole text of the language, whatever the sampling parameters. Shortly before
    `max_new_tokens` it is brought to its end on the shortest way that is found (strings and lists are closed, what is
    required is filled in); where there is none in time, it ends with "length" and is only the beginning of such a text.
    Hashable, comparable and JSON-able. Whether llguidance can enforce it is seen when a request is prepared: what it
    does not implement is refused there (`InvalidParamsError` for `grammar`), never ignored.

    Annotations are no part of a language, and are passed over: titles, defaults, examples, keywords that JSON Schema
    does not have, and a `format` other than date, time, date-time, duration, email, hostname, ipv4, ipv6, uri and uuid
    (these are enforced, where there is no `pattern` too). `propertyNames` is enforced where it lists or describes names
    by `enum`, `const`, `pattern` or length.
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
    def json_schema(cls, schema: Mapping[str, Any], *, lenient: bool = False) -> Self:
        """JSON that is valid under `schema`, on one line. Raises `InvalidParamsError` if the schema is no JSON object.

        An object that lists its `properties` gets no others, unless the schema speaks of `additionalProperties`.
        `lenient` is for callers who check the value again: what a grammar cannot enforce is then left to them
        (`uniqueItems`, `contains`, `not`, `if`, `dependentRequired`, `dependentSchemas`, `unevaluatedProperties`,
        `unevaluatedItems`, other `propertyNames`, a `pattern` that looks around, the "just one" of `oneOf`).
        """
        body = _dump("schema", schema)
        return cls(kind="json_schema", body=json.dumps(_lenient(json.loads(body))) if lenient else body)

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

        The call is written as the backbone's chat template writes it, so that `parse_tool_calls` reads it. A tool
        checks its own arguments, so its schema is taken as by `json_schema(…, lenient=True)`.
        Raises `InvalidParamsError` for tools that are none, and for a `name` that is not among them.
        """
        functions = [function_of(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
        offered = [function.name for function in functions]
        if not offered:
            raise InvalidParamsError("tools", list(tools), "at least one tool")
        if name is not None and name not in offered:
            raise InvalidParamsError("name", name, f"one of {', '.join(offered)}")
        wanted = [[f.name, dict(f.parameters)] for f in functions if name in (None, f.name)]
        body = _dump("tools", wanted)
        return cls(kind="tool_calls", body=json.dumps([[name, _lenient(schema)] for name, schema in json.loads(body)]))

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
    if _deeper_than(_MAX_DEPTH, value):
        raise InvalidParamsError(field, value, f"JSON of at most {_MAX_DEPTH} levels")
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParamsError(field, value, f"JSON: {error}") from None


def _deeper_than(most: int, value: object) -> bool:
    """Whether dicts and lists are nested in more than `most` levels; looks at each once a level."""
    level = [value]
    for _ in range(most + 1):
        below: dict[int, object] = {}
        for one in level:
            if isinstance(one, dict | list | tuple):
                below.update((id(part), part) for part in (one.values() if isinstance(one, dict) else one))
        if not below:
            return False
        level = list(below.values())
    return True


def _lark_json(schema: dict[str, Any]) -> str:
    plain = _rewritten(schema, lambda part: _without_annotations(part, schema))
    closed = plain if _composes(plain) else _rewritten(plain, _closed)
    return "%json " + json.dumps({**closed, "x-guidance": _SPACING})


def _rewritten(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The schema with `change` applied to each schema in it, the inner ones first; data (`const`, `enum`) is none."""
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            out[key] = {name: _rewritten(part, change) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            out[key] = [_rewritten(part, change) for part in value]
        elif key in _SINGLE:
            out[key] = _rewritten(value, change)
    return change(out)


def _without_annotations(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Without what JSON Schema itself says is no assertion, here: formats that are not enforced, and keywords that
    demand nothing."""
    out = {key: value for key, value in schema.items() if not any(value is v or value == v for v in _IDLE.get(key, ()))}
    if "format" in out and (not isinstance(out["format"], str) or out["format"] not in _FORMATS or "pattern" in out):
        del out["format"]
    for keyword, needs in _IDLE_WITHOUT.items():
        if needs not in out:
            out.pop(keyword, None)
    return _names_as_properties(out, root) if "propertyNames" in out else out


def _names_as_properties(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """`propertyNames` in the keywords that llguidance has, where that says the same; else as it is."""
    rule = _resolved(schema["propertyNames"], root)
    out = {key: value for key, value in schema.items() if key != "propertyNames"}
    if rule is None or rule.get("type", "string") != "string" or rule.keys() & (_NARROWING | _LISTS):
        return schema
    asserted = {key: rule[key] for key in rule if key in _NAME_KEYWORDS}
    if not asserted:
        return out
    if "properties" in schema or "patternProperties" in schema:
        return schema
    value = schema.get("additionalProperties", {})
    names = [asserted["const"]] if "const" in asserted else asserted.get("enum")
    if isinstance(names, list) and len(asserted) == 1:
        return {**out, "properties": {name: value for name in names if isinstance(name, str)}, _MORE: False}
    least, most = asserted.get("minLength", 0), asserted.get("maxLength", "")
    if asserted.keys() <= {"minLength", "maxLength"}:
        return {**out, "patternProperties": {f"^[\\s\\S]{{{least},{most}}}$": value}, _MORE: False}
    if asserted.keys() == {"pattern"}:
        return {**out, "patternProperties": {asserted["pattern"]: value}, _MORE: False}
    return schema


def _resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any] | None:
    """What a schema that may be a reference into `root` stands for; None if that is not to be found."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict):
            return None
        if "$ref" not in schema:
            return schema
        place: Any = root
        for name in str(schema["$ref"]).removeprefix("#/").split("/"):
            place = place.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
        schema = place
    return None


def _lenient(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without the assertions that no grammar makes, for callers who check what they get."""
    kept: dict[str, Any] = _rewritten(
        _rewritten(schema, lambda part: _without_annotations(part, schema)), _without_narrowing
    )
    return kept


def _without_narrowing(schema: dict[str, Any]) -> dict[str, Any]:
    out = {key: value for key, value in schema.items() if key not in _NARROWING}
    if isinstance(out.get("pattern"), str) and _LOOKS_AROUND.search(out["pattern"]):
        del out["pattern"]
    if "oneOf" in out and "anyOf" not in out:
        out["anyOf"] = out.pop("oneOf")
    return out


def _composes(value: Any) -> bool:
    """Whether an object's properties come from several places, so that no single one may be closed."""
    if isinstance(value, dict):
        if "allOf" in value or ("properties" in value and not value.keys().isdisjoint({"anyOf", "oneOf", "$ref"})):
            return True
        return any(map(_composes, value.values()))
    return isinstance(value, list) and any(map(_composes, value))


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """With `additionalProperties: false` where it lists properties: a small model would invent more."""
    named, required = schema.get("properties"), schema.get("required", [])
    # A `required` that is no list is llguidance's to refuse.
    known = isinstance(named, dict) and isinstance(required, list) and all(name in [*named] for name in required)
    return {_MORE: False, **schema} if known and "patternProperties" not in schema else schema


def _lark_pattern(pattern: str) -> str:
    """Slashes and line breaks escaped; what is escaped already stays as it is."""
    written = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return re.sub(r"\\.|[/\n]", lambda m: written.get(m[0], m[0]), pattern, flags=re.DOTALL)
