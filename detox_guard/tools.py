"""Tools: how a model is told of them, how it writes a call, and how that is read back. Knows text, no model, no engine.

Models with a tool template write calls in one of three ways::

    Hermes, Qwen   <tool_call>\\n{"name": "f", "arguments": {…}}\\n</tool_call>     also our fallback
    Llama 3        {"name": "f", "parameters": {…}}                              the whole reply
    Mistral        [TOOL_CALLS] [{"name": "f", "arguments": {…}}]                the whole reply

A template that knows no tools gets the first in plain messages: the tools in the system message, the calls in the
assistant's text, the results in `<tool_response>` tags as the user's.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from detox_guard.errors import InvalidParamsError, PromptError

__all__ = ["ToolCall", "ToolCallStream", "function_of", "knows_tools", "parse_tool_calls", "tool_format", "with_tools"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
# What a reply that is all calls begins with, white space aside. `[TOOL_CALLS]` is a special token: it may be gone.
_BARE = (_MISTRAL, '{"name":', '[{"name":')
_INSTRUCTIONS = """\
You may call functions to help with the user's request. The functions, as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON inside <tool_call> tags, for example:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>
Results come back inside <tool_response> tags. Call a function only if it helps; otherwise just answer."""


@dataclass(frozen=True)
class ToolCall:
    """One call that a model wrote. `id` is drawn when it is read: nine letters and digits, which all templates take."""

    id: str
    name: str
    arguments: dict[str, Any]


class Function(NamedTuple):
    """The part of an OpenAI-style tool that matters here."""

    name: str
    parameters: Mapping[str, Any]


class ToolFormat(NamedTuple):
    """How a call is written: `begin {"name": …, "<arguments>": …} end`."""

    begin: str
    arguments: str
    end: str

    def around(self, name: str) -> tuple[str, str]:
        """What stands before and behind the arguments of a call of `name`."""
        return f'{self.begin}{{"name": {json.dumps(name)}, "{self.arguments}": ', "}" + self.end


_HERMES = ToolFormat(_OPEN + "\n", "arguments", "\n" + _CLOSE)
# The first whose mark stands in the template. A special token cannot be forced as text: Mistral's is left out.
_FORMATS = {
    _OPEN: _HERMES,
    _MISTRAL: ToolFormat("[", "arguments", "]"),
    '"parameters": ': ToolFormat("", "parameters", ""),
}


def knows_tools(template: str | None) -> bool:
    """Whether a chat template renders tools by itself."""
    return template is not None and re.search(r"\btools\b", template) is not None


def tool_format(template: str | None) -> ToolFormat:
    """How calls are written behind this template; Hermes's way where it does not say."""
    if template is None or not knows_tools(template):
        return _HERMES
    return next((written for mark, written in _FORMATS.items() if mark in template), _HERMES)


def function_of(tool: object, field: str) -> Function:
    """Name and parameters of an OpenAI-style tool. Raises `InvalidParamsError` naming `field`."""
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise InvalidParamsError(field, tool, '{"type": "function", "function": {"name", "description", "parameters"}}')
    name, parameters = function.get("name"), function.get("parameters") or {}
    if not isinstance(name, str) or not name:
        raise InvalidParamsError(f"{field}.function.name", name, "a string of at least one character")
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidParamsError(f"{field}.function.parameters", parameters, 'a JSON schema of type "object"')
    return Function(name, {"type": "object", "properties": {}, **parameters})


# --- telling ---------------------------------------------------------------------------------------------------------


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain messages that say the same, for a template that knows only role and content.

    Raises `PromptError` for a tool call in the history that has no name or no arguments.
    """
    plain: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "tool":
            response = f"<tool_response>\n{content}\n</tool_response>"
            if i and messages[i - 1]["role"] == "tool":  # one turn of the user's, as templates want turns to alternate
                plain[-1]["content"] += "\n" + response
            else:
                plain.append({"role": "user", "content": response})
        else:
            calls = [
                _written(call, f"messages[{i}].tool_calls[{k}]")
                for k, call in enumerate(message.get("tool_calls") or ())
            ]
            plain.append({"role": role, "content": "\n".join([content, *calls] if content else calls or [""])})
    if tools:
        told = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if plain and plain[0]["role"] == "system":
            plain[0]["content"] = f"{plain[0]['content']}\n\n{told}".lstrip()
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain


def _written(call: object, field: str) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(field, call, '{"id", "type": "function", "function": {"name", "arguments"}}')
    arguments = function.get("arguments")
    if not isinstance(arguments, Mapping):
        raise PromptError(f"{field}.function.arguments", arguments, "a dict")
    head, tail = _HERMES.around(function["name"])
    return head + json.dumps(arguments, ensure_ascii=False) + tail


# --- reading ---------------------------------------------------------------------------------------------------------


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall], list[str]]:
    """A whole reply as its content, its calls, and the raw text of calls that cannot be read. Never raises."""
    stream = ToolCallStream()
    parts = [*stream.push(text), *stream.flush()]
    content = "".join(part for part in parts if isinstance(part, str))
    return content, [part for part in parts if isinstance(part, ToolCall)], stream.invalid


class ToolCallStream:
    """Reads a reply as it comes. However it is cut into pieces, the parts are those of `parse_tool_calls`.

    Text inside a call is never content, nor is white space that only sets calls apart. A reply that might be nothing
    but calls (it begins like one) is held back until that is certain.
    """

    def __init__(self) -> None:
        self.invalid: list[str] = []
        """Raw text of calls that cannot be read."""
        self._held = ""
        self._inside = False
        self._begun = False
        self._called = False

    def push(self, delta: str) -> list[str | ToolCall]:
        """What this piece of the reply completes: text that is safe to show, and whole calls."""
        self._held += delta
        if not self._begun:
            start = "".join(self._held[:256].split())
            if any(mark.startswith(start) or start.startswith(mark) for mark in _BARE):
                return []
            self._begun = True
        parts: list[str | ToolCall] = []
        while (at := _end_of_block(self._held) if self._inside else self._held.find(_OPEN)) >= 0:
            tag = _CLOSE if self._inside else _OPEN
            before, self._held = self._held[:at], self._held[at + len(tag) :]
            parts += self._calls(before, _OPEN + before + _CLOSE) if self._inside else [before.rstrip()]
            self._inside = not self._inside
        if not self._inside:
            # Hold back what may yet be a tag, and white space in front of one.
            safe = len(self._held[: len(self._held) - _begun_tag(self._held)].rstrip())
            parts.append(self._held[:safe])
            self._held = self._held[safe:]
        return [part for part in parts if part]

    def flush(self) -> list[str | ToolCall]:
        """The reply is over: what is left of it."""
        held, self._held = self._held, ""
        if self._inside:  # the model stopped without the closing tag
            return [*self._calls(held, _OPEN + held)]
        bare = held.strip().removeprefix(_MISTRAL)
        if not self._begun and held.strip() and (found := _read(bare)):
            return [*found]
        if not self._begun and held.lstrip().startswith(_MISTRAL):
            self.invalid.append(held)
            return []
        if not self._begun and _OPEN in held:
            self._begun, self._held = True, held
            return [*self.push(""), *self.flush()]
        return [] if not held or (self._called and not held.strip()) else [held]

    def _calls(self, block: str, raw: str) -> list[ToolCall]:
        self._called = True
        calls = _read(block)
        if not calls:
            self.invalid.append(raw)
        return calls


def _read(block: str) -> list[ToolCall]:
    """The calls of a JSON object or of a list of them; none if any part is no call."""
    try:
        value = json.loads(block)
    except (ValueError, RecursionError):
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return []
        arguments = item.get("arguments", item.get("parameters"))
        if isinstance(arguments, str):  # some models quote them
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return []
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(secrets.token_hex(5)[:9], item["name"], arguments))
    return calls


def _end_of_block(text: str) -> int:
    """Where the first closing tag stands that is not inside a JSON string, or -1."""
    at = text.find(_CLOSE)
    while at >= 0 and re.sub(r"\\.", "", text[:at], flags=re.DOTALL).count('"') % 2:
        at = text.find(_CLOSE, at + 1)
    return at


def _begun_tag(text: str) -> int:
    """Length of the longest end of `text` that begins an opening tag."""
    return next((n for n in range(min(len(_OPEN) - 1, len(text)), 0, -1) if _OPEN.startswith(text[-n:])), 0)
