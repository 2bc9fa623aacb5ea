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
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from detox_guard._plain import as_plain, json_fault
from detox_guard.errors import InvalidParamsError
from detox_guard.text.calls import ToolCall, ToolCallStream, parse_tool_calls

__all__ = [
    "ToolCall",
    "ToolCallStream",
    "function_of",
    "knows_tools",
    "parse_tool_calls",
    "tool_choice_of",
    "tool_format",
    "with_tools",
]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
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


class ToolChoice(NamedTuple):
    """What a reply may do about tools."""

    mode: Literal["auto", "none", "any"]
    """As it likes; call none; call one."""
    name: str | None = None
    """With "any": the tool that is to be called."""


_MODES: dict[str, Literal["auto", "none", "any"]] = {"auto": "auto", "none": "none", "any": "any", "required": "any"}


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
    if fault := json_fault(tool):
        raise InvalidParamsError(f"{field}.function", function, fault)
    name, parameters = function.get("name"), function.get("parameters") or {}
    if not isinstance(name, str) or not name:
        raise InvalidParamsError(f"{field}.function.name", name, "a string of at least one character")
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidParamsError(f"{field}.function.parameters", parameters, 'a JSON schema of type "object"')
    return Function(name, {"type": "object", "properties": {}, **parameters})


def tool_choice_of(choice: object, tools: Sequence[object]) -> ToolChoice:
    """A `tool_choice` as any provider writes it: None (auto), a truth value, a word ("required" is "any"), the name of
    a tool, or a dict with a `type`, and for a tool with its `name` or `function`.

    Raises `InvalidParamsError`, also for a call that is forced where there are no tools.
    """
    names = [function_of(tool, f"tools[{i}]").name for i, tool in enumerate(tools)]
    word = name = choice
    if choice is None or isinstance(choice, bool):
        word, name = "auto" if choice is None else "any" if choice else "none", None
    elif isinstance(choice, Mapping):
        word, function = choice.get("type"), choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) and word in ("function", "tool", None) else None
    mode = _MODES.get(word) if isinstance(word, str) else None
    if mode is None and name in names:
        return ToolChoice("any", str(name))
    if mode is None or (mode == "any" and not names):
        bound = f"one of {', '.join([*_MODES, *names])}" if names else "auto or none where there are no tools"
        raise InvalidParamsError("tool_choice", choice, bound)
    return ToolChoice(mode)


# --- telling ---------------------------------------------------------------------------------------------------------


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain messages that say the same, for a template that knows only role and content.

    `messages` as `detox_guard.text.messages.read_messages` gives them.
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
            calls = [_written(call["function"]) for call in message.get("tool_calls", ())]
            beside = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append({**beside, "content": "\n".join([content, *calls] if content else calls or [""])})
    if tools:
        told = _INSTRUCTIONS.format(tools="\n".join(json.dumps(as_plain(tool), ensure_ascii=False) for tool in tools))
        if plain and plain[0]["role"] == "system":
            plain[0]["content"] = f"{plain[0]['content']}\n\n{told}".lstrip()
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain


def _written(function: Mapping[str, Any]) -> str:
    head, tail = _HERMES.around(function["name"])
    return head + json.dumps(function["arguments"], ensure_ascii=False) + tail
