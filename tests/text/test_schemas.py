"""JSON schemas as people write them: names of keys, what pydantic annotates, formats, depth, and what is refused."""

from __future__ import annotations

import enum
import ipaddress
import json
import re
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import jsonschema
import pytest
from pydantic import ByteSize, IPvAnyAddress, Json, SecretStr, create_model

from detox_guard import DetoxiGen, Grammar, InvalidParamsError

PROMPT = "The quick brown fox"


class Colour(enum.StrEnum):
    red = "red"
    blue = "blue"


NAMED = {
    "an enum": ({"enum": ["a", "b"]}, {"type": "integer"}),
    "a reference": ({"$ref": "#/$defs/Colour"}, {"type": "boolean"}),
    "a constant": ({"const": "only"}, {"type": "null"}),
    "a pattern": ({"pattern": "^[a-c]{2}$"}, {"type": "integer"}),
    "a length": ({"minLength": 2, "maxLength": 3}, {"type": "integer"}),
}


@pytest.mark.parametrize("names", NAMED)
def test_names_of_keys_are_enforced(model: DetoxiGen, names: str) -> None:
    rule, value = NAMED[names]
    schema = {
        "type": "object", "propertyNames": rule, "additionalProperties": value, "minProperties": 1,
        "$defs": {"Colour": {"enum": ["red", "blue"], "type": "string"}},
    }  # fmt: skip
    for seed in range(4):
        reply = model.generate(PROMPT, grammar=Grammar.json_schema(schema), max_new_tokens=60, seed=seed)
        assert reply.finish_reason == "stop"
        jsonschema.validate(json.loads(reply.text), schema)
        assert json.loads(reply.text)


ANNOTATED: dict[str, Any] = {
    "path": Path, "bytes": bytes, "secret": SecretStr, "any address": IPvAnyAddress, "json": Json[int],
    "pattern object": re.Pattern, "size": ByteSize, "duration": timedelta, "decimal": Decimal,
    "by enum": dict[Colour, int], "by path": dict[Path, int], "by id": dict[UUID, str], "by number": dict[int, str],
}  # fmt: skip


@pytest.mark.parametrize("kind", ANNOTATED)
@pytest.mark.parametrize("lenient", [False, True])
def test_what_pydantic_annotates_can_be_asked_for(model: DetoxiGen, kind: str, lenient: bool) -> None:
    schema = create_model("Model", x=(ANNOTATED[kind], ...)).model_json_schema()
    reply = model.generate(PROMPT, grammar=Grammar.json_schema(schema, lenient=lenient), max_new_tokens=80)
    if reply.finish_reason == "stop":
        jsonschema.validate(json.loads(reply.text), schema)


def test_formats_that_are_known_are_still_enforced_and_data_is_left_alone(model: DetoxiGen) -> None:
    for form in ("date", "uuid", "ipv4"):
        schema = {"type": "object", "properties": {"x": {"type": "string", "format": form}}, "required": ["x"]}
        reply = model.generate(PROMPT, grammar=Grammar.json_schema(schema), max_new_tokens=80)
        value = json.loads(reply.text)["x"]
        {"date": date.fromisoformat, "uuid": UUID, "ipv4": ipaddress.IPv4Address}[form](value)
    data = {"format": "phone", "uniqueItems": False, "propertyNames": {}}
    for lenient in (False, True):
        reply = model.generate(PROMPT, grammar=Grammar.json_schema({"const": data}, lenient=lenient), max_new_tokens=80)
        assert json.loads(reply.text) == data


BEYOND: list[dict[str, Any]] = [
    {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
    {"type": "object", "not": {"required": ["x"]}},
    {"type": "object", "if": {"required": ["x"]}, "then": {"required": ["y"]}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "unevaluatedProperties": False},
    {"type": "array", "contains": {"type": "integer"}, "minContains": 1},
    {"type": "string", "pattern": "^(?!x)[a-z]{2}$"},
    {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    {"type": "object", "propertyNames": {"not": {"const": "x"}}},
]


@pytest.mark.parametrize("schema", BEYOND, ids=str)
def test_what_no_grammar_asserts_is_refused_unless_the_caller_checks_again(
    model: DetoxiGen, schema: dict[str, Any]
) -> None:
    whole = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    with pytest.raises(InvalidParamsError) as caught:
        model.generate(PROMPT, grammar=Grammar.json_schema(whole))
    assert caught.value.field == "grammar"
    reply = model.generate(PROMPT, grammar=Grammar.json_schema(whole, lenient=True), max_new_tokens=60)
    assert "x" in json.loads(reply.text)
    tool = {"type": "function", "function": {"name": "f", "parameters": whole}}
    assert model.generate(PROMPT, grammar=Grammar.tool_calls([tool]), max_new_tokens=90).text


@pytest.mark.parametrize("levels", [130, 500, 990, 5000, 100_000])
def test_schemas_nested_too_deep_are_named_and_the_next_is_served(model: DetoxiGen, levels: int) -> None:
    nested: dict[str, Any] = {}
    listed: Any = 1
    for _ in range(levels):
        nested, listed = {"items": nested}, [listed]
    for make in (
        lambda: Grammar.json_schema(nested),
        lambda: Grammar.json_schema(nested, lenient=True),
        lambda: Grammar.json_schema({"const": listed}),
    ):
        with pytest.raises(InvalidParamsError, match="120 levels") as caught:
            make()
        assert caught.value.field == "schema"
    assert model.generate(PROMPT, max_new_tokens=2).finish_reason in ("stop", "length")


def test_a_schema_as_deep_as_allowed_is_enforced(model: DetoxiGen) -> None:
    nested: dict[str, Any] = {"type": "integer"}
    for _ in range(50):
        nested = {"type": "object", "properties": {"a": nested}}
    assert model.generate(PROMPT, grammar=Grammar.json_schema(nested), max_new_tokens=60).text.startswith("{")


def test_a_panic_in_native_code_is_an_error_by_name(model: DetoxiGen, monkeypatch: pytest.MonkeyPatch) -> None:
    import llguidance

    class Panic(BaseException):
        pass

    def panics(*_: Any, **__: Any) -> Any:
        raise Panic("index out of bounds")

    monkeypatch.setattr(llguidance, "LLMatcher", panics)
    with pytest.raises(InvalidParamsError, match="index out of bounds"):
        model.generate(PROMPT, grammar=Grammar.json_object())
