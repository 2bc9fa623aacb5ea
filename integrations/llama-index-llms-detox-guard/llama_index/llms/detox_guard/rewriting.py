"""A structured answer, judged string by string. Knows schemas; knows no LLM and no policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import BaseModel, ValidationError

import detox_guard

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["rewritten"]


def rewritten(answer: BaseModel, judged: Callable[[str], str]) -> BaseModel:
    """The structured answer with every string judged, and every key that is not its schema's. Raises `GuardError` if
    what is left breaks its schema."""
    named = _property_names(type(answer).model_json_schema())

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if key in named or not key else judged(key): walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return judged(value) if isinstance(value, str) and value else value

    before = answer.model_dump(mode="json")
    after = walk(before)
    if after == before:
        return answer
    try:
        return type(answer).model_validate(after)
    except ValidationError as error:
        raise detox_guard.GuardError(
            f"a guarded {type(answer).__name__} no longer fits its schema: {error.error_count()} fields"
        ) from error


def _property_names(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return {name for part in schema for name in _property_names(part)}
    if not isinstance(schema, dict):
        return set()
    own = schema.get("properties")
    names = set(own) if isinstance(own, dict) else set()
    return names.union(*(_property_names(part) for part in schema.values()))
