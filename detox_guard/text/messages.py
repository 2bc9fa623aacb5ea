"""Chat histories as any provider writes them, and the ways to lay them out for a template.

Knows OpenAI's messages and their relatives; knows no tokenizer and renders nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from detox_guard._plain import as_plain, decoded_whole, json_fault, whole_text
from detox_guard.errors import PromptError

__all__ = ["Layout", "checked_text", "layouts", "read_messages", "strings_in"]

Messages = list[dict[str, Any]]

_ROLES = {
    "human": "user",
    "ai": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "developer": "system",
    "function": "tool",
}
"""What other providers call the four roles."""
_JOINED = ("content", "reasoning_content")
_WRITTEN_BY_MODELS = ("assistant", "tool")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_FIT_ID = re.compile(r"[A-Za-z0-9]{9}")


class Layout(NamedTuple):
    """One way to say a history to a template: the messages, and the tools that it is to render itself."""

    messages: Messages
    tools: list[dict[str, Any]]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_messages(messages: object) -> Messages:
    """The messages in one form: `role`, `content` (str) and, where there are some, `tool_calls` with ids and dicts.

    Taken as well: roles of other providers, a null content of an assistant or a tool, content in parts of text (joined
    by line breaks), arguments as JSON text or missing, calls without the "function" level, the older `function_call`.
    Half a character that a model or a tool wrote becomes U+FFFD. Calls and results without an id get one, in order.
    Raises `PromptError` that names what cannot be read.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError("messages", messages, "at least one message")
    out: Messages = []
    waiting: dict[str, str] = {}  # calls without a result so far: id to name
    for i, message in enumerate(messages):
        read = _message(message, f"messages[{i}]")
        for k, call in enumerate(read.get("tool_calls", ())):
            call["id"] = call["id"] or _fit_id(f"{i} {k}")
            waiting[call["id"]] = call["function"]["name"]
        if read["role"] == "tool":
            _answer(read, waiting)
        out.append(read)
    return out


def checked_text(field: str, value: object, *, may_be_empty: bool = False) -> str:
    """A text that a tokenizer takes. Raises `PromptError`."""
    if not isinstance(value, str):
        raise PromptError(field, value, "a string")
    if not value and not may_be_empty:
        raise PromptError(field, value, "at least one character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(field, value[error.start : error.end], "valid Unicode, without lone surrogates") from None
    return value


def strings_in(value: object) -> list[str]:
    """All strings among the keys and values of nested mappings and lists, as in the arguments of a tool call."""
    texts = []
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            part = [one for pair in part.items() for one in pair]
        if isinstance(part, list | tuple):
            left += reversed(part)
        elif isinstance(part, str):
            texts.append(part)
    return texts


def _message(message: object, field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(field, message, "a mapping with role and content")
    role = checked_text(f"{field}.role", message.get("role"))
    role = _ROLES.get(role, role)
    read: dict[str, Any] = {"role": role}
    calls = _calls(message, field) if role == "assistant" else []
    content = message.get("content")
    if content is None and (calls or ("content" in message and role in _WRITTEN_BY_MODELS)):
        content = ""
    read["content"] = _content(content, f"{field}.content", mend=role in _WRITTEN_BY_MODELS)
    for key, value in message.items():
        if key not in ("role", "content", "tool_calls", "function_call") and value is not None:
            if fault := json_fault(value):
                raise PromptError(f"{field}.{key}", value, fault)
            read[str(key)] = as_plain(value)
    if calls:
        read["tool_calls"] = calls
    return read


def _content(content: object, field: str, *, mend: bool) -> str:
    if isinstance(content, list | tuple):
        texts = [_part(part, f"{field}[{k}]") for k, part in enumerate(content)]
        content = "\n".join(filter(None, texts))
    if mend and isinstance(content, str):
        content = whole_text(content)
    return checked_text(field, content, may_be_empty=True)


def _part(part: object, field: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(_TEXT_PARTS[kind]) if isinstance(part, Mapping) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise PromptError(field, part, 'a part of text, {"type": "text", "text": …}: it reads nothing else')
    return text


def _calls(message: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    given, field_of = message.get("tool_calls"), f"{field}.tool_calls"
    if given is None and isinstance(message.get("function_call"), Mapping):
        given, field_of = [message["function_call"]], f"{field}.function_call"
    if given is not None and not isinstance(given, list | tuple):
        raise PromptError(field_of, given, "a list of calls")
    return [_call(call, f"{field_of}[{k}]") for k, call in enumerate(given or ())]


def _call(call: object, field: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise PromptError(field, call, '{"id", "type": "function", "function": {"name", "arguments"}}')
    arguments = next((function[key] for key in ("arguments", "args", "input") if key in function), None)
    where = f"{field}.function.arguments"
    if isinstance(arguments, str):
        try:
            arguments = decoded_whole(arguments) if arguments.strip() else {}
        except ValueError:
            raise PromptError(where, arguments, "a dict, or one as JSON text") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise PromptError(where, arguments, "a dict, or one as JSON text")
    if fault := json_fault(arguments):
        raise PromptError(where, arguments, fault)
    written = {"name": whole_text(name), "arguments": as_plain(arguments)}
    return {"id": whole_text(str(call.get("id") or "")), "type": "function", "function": written}


def _answer(result: dict[str, Any], waiting: dict[str, str]) -> None:
    """Give the result of a call the id and the name of it. Without an id: the first of its name, or the first."""
    call_id = str(result.get("tool_call_id") or "")
    if not call_id:
        named = [one for one, name in waiting.items() if name == result.get("name")]
        call_id = next(iter(named or waiting), "")
    name = waiting.pop(call_id, None)
    if call_id:
        result["tool_call_id"] = call_id
    if name and not result.get("name"):
        result["name"] = name


def _fit_id(call_id: str) -> str:
    """Nine letters and digits, which all templates take; the same for the same id."""
    return call_id if _FIT_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


# --- laying out ------------------------------------------------------------------------------------------------------


def layouts(messages: Messages, tools: Sequence[Mapping[str, Any]], *, native: bool) -> Iterator[Layout]:
    """Ways to say the same, from the plainest on; a template takes the first that it neither refuses nor cuts short.

    `native`: the template knows tools. It may still refuse ids that are not its own, a system role, or several calls in
    one turn. After that, and for a template that does not know them, calls and results are told in plain text. The last
    way is turns of user and assistant that alternate, the user's first.
    """
    from detox_guard.text.tools import with_tools

    if native:
        shown = [as_plain(tool) for tool in tools]
        fit = [_with_fit_ids(message) for message in messages]
        for said in (
            messages,
            fit,
            _without_system(fit),
            _one_call_a_turn(fit),
            _without_system(_one_call_a_turn(fit)),
        ):
            yield Layout(said, shown)
    told = with_tools(messages, tools)
    yield Layout(told, [])
    yield Layout(_merged(told), [])
    yield Layout(_alternating(told), [])


def _with_fit_ids(message: dict[str, Any]) -> dict[str, Any]:
    fit = dict(message)
    if "tool_calls" in fit:
        fit["tool_calls"] = [{**call, "id": _fit_id(call["id"])} for call in fit["tool_calls"]]
    if "tool_call_id" in fit:
        fit["tool_call_id"] = _fit_id(str(fit["tool_call_id"]))
    return fit


def _one_call_a_turn(messages: Messages) -> Messages:
    """Each call in a turn of its own with its result behind it, and what was said beside them in a turn before."""
    out: Messages = []
    moved: set[int] = set()
    for i, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if i in moved:
            continue
        if not calls:
            out.append(message)
            continue
        if message["content"]:
            out.append({key: value for key, value in message.items() if key != "tool_calls"})
        for call in calls:
            out.append({**message, "content": "", "tool_calls": [call]})
            for k in range(i + 1, len(messages)):
                if messages[k]["role"] != "tool":
                    break
                if k not in moved and messages[k].get("tool_call_id") == call["id"]:
                    out.append(messages[k])
                    moved.add(k)
                    break
    return out


def _joined(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _merged(messages: Messages) -> Messages:
    """Runs of one role as one message."""
    out: Messages = []
    for message in messages:
        if out and out[-1]["role"] == message["role"]:
            both = {
                key: _joined(str(out[-1][key]), str(message[key])) for key in _JOINED if key in out[-1].keys() & message
            }
            out[-1] = {**message, **out[-1], **both}
        else:
            out.append(message)
    return out


def _without_system(messages: Messages) -> Messages:
    """What the system says begins the user's next turn, or is one."""
    out: Messages = []
    said = ""
    for message in messages:
        if message["role"] == "system":
            said = _joined(said, message["content"])
        elif said and message["role"] == "user":
            out.append({**message, "content": _joined(said, message["content"])})
            said = ""
        else:
            if said:
                out.append({"role": "user", "content": said})
                said = ""
            out.append(message)
    return [*out, {"role": "user", "content": said}] if said or not out else out


def _alternating(messages: Messages) -> Messages:
    turns = _merged(_without_system(messages))
    return turns if turns[0]["role"] == "user" else [{"role": "user", "content": ""}, *turns]
