"""The words that a reader or a tool finds in a message, and how they are replaced. Knows messages; scores nothing."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from detox_guard import replace_strings
from langchain_core.messages import BaseMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel

_TECHNICAL = frozenset({
    "usage_metadata", "type", "status", "index", "role", "mime_type", "signature", "thought_signature",
    "encrypted_content", "model_name", "model", "model_provider", "finish_reason", "stop_reason", "system_fingerprint",
    "service_tier", "object", "created_at", "token_usage", "chunk_position", "example",
})  # fmt: skip
"""Fields whose values are a provider's, where they are one plain word: no reader takes them for text."""
_VOCABULARY = _TECHNICAL | {
    "text", "id", "name", "args", "input", "arguments", "function", "reasoning", "reasoning_content", "thinking",
    "summary", "refusal", "content", "annotations", "title", "url", "extras", "data", "source", "value", "output",
    "tool_calls", "tool_call", "tool_use", "tool_call_id", "image_url", "json", "file", "audio", "error", "citation",
    "additional_kwargs", "response_metadata", "invalid_tool_calls", "artifact", "code", "transcript", "logprobs",
}  # fmt: skip
"""Keys that providers and LangChain use; any other key may be a model's own words."""
_FREE = frozenset({
    "args", "input", "arguments", "artifact", "json", "value", "output", "data", "parsed", "structured_response",
})  # fmt: skip
"""Fields of an envelope whose insides are a tool's or a model's own, whatever their keys are called."""
_IDS = ("id", "tool_call_id", "call_id")
_ONE_WORD = re.compile(r"[\w./:-]{1,64}")
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_OPAQUE = re.compile(r"\w*\d\w*|[0-9a-fA-F]+|\w*[a-z][A-Z]\w*")


def words_of(value: object, known: frozenset[str] = frozenset(), *, envelope: bool = False) -> list[str]:
    """Every string in a message, a mapping, a list, a model or a dataclass, keys too, and JSON text decoded; each once.

    `known` words (names of tools, of their parameters) are the developer's own and left out, and so is what only
    programs read in a message's envelope: a message, or with `envelope` a part of one, outside of what `_FREE` holds.
    """
    found: dict[str, None] = {}
    seen: set[tuple[int, bool]] = set()
    waiting: list[tuple[str, object, bool]] = [("", value, envelope)]
    while waiting:  # no recursion: what a model wrote may be nested deeper than Python's stack
        field, one, inner = waiting.pop()
        if isinstance(one, bytes | bytearray):
            one = bytes(one).decode(errors="replace")
        if isinstance(one, str):
            text = _spoken(field, one) if inner else one
            if text.strip() and text not in known:
                found[text] = None
                waiting += [("", part, False) for part in _decoded(text)]
            continue
        inner = inner or isinstance(one, BaseMessage)
        if (inside := _fields_of(one)) is not None and (id(one), inner) not in seen:
            seen.add((id(one), inner))
            for key, part in inside:
                if isinstance(key, str) and key not in _VOCABULARY:
                    waiting.append(("", key, False))
                # Under a key that no provider uses, or in a list that stands alone, nothing is an envelope's.
                kept = (
                    inner and (key is None or isinstance(one, BaseMessage) or key in _VOCABULARY) and key not in _FREE
                )
                waiting.append((key if isinstance(key, str) else "", part, kept))
    return list(found)


def replaced(value: Any, change: Callable[[str], str]) -> Any:
    """The same with every string changed, keys too that may be a model's own words. Raises `GuardError`."""
    return replace_strings(value, change, _VOCABULARY)


def names_in(tools: Any) -> frozenset[str]:
    """The developer's own words: the names of tools, and of their parameters at any depth."""
    words: set[str] = set()
    for tool in tools:
        try:
            function = convert_to_openai_tool(tool)["function"]
        except Exception:  # a provider's own tool: it has no schema
            continue
        words.add(function["name"])
        waiting = [function.get("parameters")]
        while waiting:
            one = waiting.pop()
            if isinstance(one, Mapping):
                properties = one.get("properties")
                words.update(properties if isinstance(properties, Mapping) else ())
                waiting += one.values()
            elif isinstance(one, list):
                waiting += one
    return frozenset(words)


def _fields_of(value: object) -> list[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, BaseModel):
        fields = [*value.__dict__.items(), *(value.__pydantic_extra__ or {}).items()]
        if isinstance(value, BaseMessage):
            fields = [("text", str(value.text)), *fields]  # as a reader joins its blocks
            ours = value.response_metadata.get("model_provider") == "detox_guard"
            # What we tell of a reply is no part of it.
            fields = [(key, {} if ours and key == "response_metadata" else part) for key, part in fields]
        return fields
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    if isinstance(value, list | tuple | set | frozenset):
        return [(None, part) for part in value]
    return None


def _spoken(field: str, text: str) -> str:
    """What of a string is words: of an id, the parts that no program drew; of a provider's field, none."""
    if (field not in _TECHNICAL and field not in _IDS) or not _ONE_WORD.fullmatch(text):
        return text
    parts = [part for part in re.split(r"[\W_]+", text) if part and not _OPAQUE.fullmatch(part)]
    return "" if field in _TECHNICAL and len(parts) < 2 else " ".join(parts)


def _decoded(text: str) -> list[Any]:
    """JSON inside a string, decoded; where it is cut or is none, its escapes at least."""
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            return [] if value == text else [value]
    plain = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
    return [plain] if plain != text else []
