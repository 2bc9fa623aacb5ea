"""From LangChain's tools, choices and schemas to the core's prompts and grammars, and back to tool calls.

Knows the forms that `bind_tools` and `with_structured_output` accept; knows no model and decodes nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Literal

from detox_guard import (
    Grammar,
    IncompleteAnswerError,
    InvalidParamsError,
    PromptError,
    ToolCall,
    ToolCallStream,
    parse_tool_calls,
    tool_choice_of,
)
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    merge_message_runs,
)
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Sequence

ToolDict = dict[str, Any]

_ROLES: dict[type[BaseMessage], str] = {SystemMessage: "system", HumanMessage: "user", AIMessage: "assistant"}
_CHAT_ROLES: dict[str, type[BaseMessage]] = {
    "system": SystemMessage, "developer": SystemMessage, "user": HumanMessage, "human": HumanMessage,
    "assistant": AIMessage, "ai": AIMessage, "model": AIMessage,
}  # fmt: skip
"""Roles of a `ChatMessage` that LangChain has a class for."""
_TEXTS = ("text", "input_text", "output_text", "text-plain")
_DATA = ("json", "non_standard")
"""Blocks of a tool's result that are read as JSON."""
_IGNORED_IN_REPLIES = {
    "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call", "input_json_delta", "reasoning",
    "thinking", "redacted_thinking", "refusal", "server_tool_call", "server_tool_result", "server_tool_use",
    "web_search_tool_result", "non_standard",
}  # fmt: skip
"""Blocks of an earlier assistant message, by whatever model, that this one reads as little as its tools' JSON: its text
and `tool_calls` say what was said."""
UNFINISHED = ("length", "guard")
"""Reasons to finish that leave a structured answer without its end."""
_FIRST_CALL = 1000
"""Index of a reply's first call: LangChain numbers its blocks from 0, and merges what has one number."""


def shown_of(tools: Any) -> list[ToolDict]:
    """The tools as OpenAI writes them. Raises `InvalidParamsError`."""
    if not isinstance(tools, list | tuple):
        raise InvalidParamsError("tools", tools, "a list of tools")
    return [tool_of(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def tool_of(tool: Any, field: str) -> ToolDict:
    """A tool, or a schema, as OpenAI writes a tool. Raises `InvalidParamsError` with the field."""
    try:
        return convert_to_openai_tool(tool)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        bound = "a tool, a function, a pydantic class, or a schema with a title"
        raise InvalidParamsError(field, tool, bound) from error


@dataclass(frozen=True)
class Asked:
    """What one call asks of the reply: the tools to show, the grammar to hold it to, the schema to tell it of."""

    tools: tuple[ToolDict, ...] = ()
    grammar: Grammar | None = None
    schema: dict[str, Any] | None = None
    parallel: bool = True
    """Whether a reply may hold more than one tool call."""
    keep: bool = False
    """An answer under a grammar that was cut off is handed on as it is."""

    @classmethod
    def of(
        cls,
        tools: Sequence[Any] | None = None,
        tool_choice: object = None,
        response_format: dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        unfinished: Literal["raise", "keep"] = "raise",
    ) -> Asked:
        """Read the keywords that `bind_tools` and `with_structured_output` bind. Raises `InvalidParamsError`."""
        if unfinished not in ("raise", "keep"):
            raise InvalidParamsError("unfinished", unfinished, "raise or keep")
        if parallel_tool_calls not in (None, True, False):
            raise InvalidParamsError("parallel_tool_calls", parallel_tool_calls, "True, False or None")
        keep = unfinished == "keep"
        shown = tuple(shown_of([] if tools is None else tools))
        choice = tool_choice_of(tool_choice, shown)
        if response_format is not None:
            if shown and choice.mode != "none":
                raise InvalidParamsError(
                    "response_format", response_format, "not together with tools", hint="let the schema be a tool"
                )
            return cls._formatted(response_format, keep)
        if choice.mode == "none":
            return cls()
        if choice.mode == "auto":
            return cls(shown, parallel=parallel_tool_calls is not False)
        return cls(shown, Grammar.tool_calls(shown, name=choice.name), keep=keep)

    @classmethod
    def _formatted(cls, response_format: dict[str, Any], keep: bool) -> Asked:
        kind = response_format.get("type") if isinstance(response_format, dict) else None
        if kind == "json_object":
            schema = response_format.get("schema")
            lenient = response_format.get("strict") is False
            own = Grammar.json_object() if schema is None else Grammar.json_schema(schema, lenient=lenient)
            return cls(grammar=own, keep=keep)
        if kind == "json_schema" and isinstance(response_format.get("json_schema"), dict):
            schema = response_format["json_schema"].get("schema")
            lenient = response_format["json_schema"].get("strict") is False
            if isinstance(schema, dict):
                return cls(grammar=Grammar.json_schema(schema, lenient=lenient), schema=schema, keep=keep)
        raise InvalidParamsError("response_format", response_format, "OpenAI's json_object or json_schema")

    def check(self, finish_reason: str) -> None:
        """Raise `IncompleteAnswerError` for a reply under a grammar that did not come to its end."""
        if self.grammar is not None and finish_reason in UNFINISHED and not self.keep:
            raise IncompleteAnswerError(finish_reason)

    def messages(self, messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
        """The core's messages. A schema is told of in the system message: the grammar alone explains nothing."""
        out = as_messages(messages)
        if self.schema is not None:
            told = f"Answer only with JSON that fits this schema:\n{json.dumps(self.schema, ensure_ascii=False)}"
            if out[0]["role"] == "system":
                out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{told}"}
            else:
                out.insert(0, {"role": "system", "content": told})
        return out


def schema_of(schema: Any) -> dict[str, Any]:
    """The JSON schema of a pydantic class, a TypedDict, a function or a schema. Raises `InvalidParamsError`."""
    if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):  # as OpenAI names it
        return dict(schema["schema"])
    if isinstance(schema, dict) and not schema.keys() & {"function", "parameters"}:
        return schema
    try:
        if isinstance(schema, type) and issubclass(schema, BaseModel):  # LangChain's way drops what refers to itself
            return schema.model_json_schema()
        return convert_to_json_schema(schema)
    except (TypeError, ValueError) as error:
        raise InvalidParamsError("schema", schema, str(error)) from error


def as_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """The core's messages, of a history that any provider's model may have written. Runs of one role become one: many
    templates insist on turns. Raises `PromptError`.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError("messages", messages, "at least one message")
    normal = _paired([one for i, message in enumerate(messages) for one in _normal(i, message)])
    # LangChain's merging trips over neighbouring `ChatMessage`s of different roles.
    runs = [merge_message_runs(list(run)) for _, run in groupby(normal, key=lambda one: getattr(one, "role", None))]
    return [_as_message(i, message) for i, message in enumerate(chain.from_iterable(runs))]


def _normal(i: int, message: BaseMessage) -> list[BaseMessage]:
    """One message in LangChain's own forms: by class, its text alone, calls and results where they belong."""
    if not isinstance(message, BaseMessage):
        raise PromptError(f"messages[{i}]", type(message).__name__, "a LangChain message")
    if isinstance(message, ChatMessage) and message.role.lower() in _CHAT_ROLES:
        kind = _CHAT_ROLES[message.role.lower()]
        return _normal(i, kind(message.content, additional_kwargs=message.additional_kwargs))
    if isinstance(message, FunctionMessage | ToolMessage):
        named = message.name or None
        answered = message.tool_call_id if isinstance(message, ToolMessage) else ""
        return [ToolMessage(_text_of(i, message), tool_call_id=answered, name=named)]
    if isinstance(message, AIMessage):
        invalid = [call for call in message.invalid_tool_calls if call["id"] is not None]
        calls = message.tool_calls or _calls_of(message)
        return [AIMessage(_text_of(i, message), tool_calls=calls, invalid_tool_calls=invalid)]
    results = [block for block in _blocks(message) if block.get("type") == "tool_result"]
    if not results:
        return [message.model_copy(update={"content": _text_of(i, message)})]
    out: list[BaseMessage] = [
        ToolMessage(_text(i, one.get("content"), ToolMessage), tool_call_id=str(one.get("tool_use_id") or ""))
        for one in results
    ]
    rest = [one for one in message.content if one not in results]
    return [*out, message.model_copy(update={"content": _text(i, rest, type(message))})] if rest else out


def _calls_of(message: AIMessage) -> list[Any]:
    """Calls that stand elsewhere than in `tool_calls`: blocks of content, and OpenAI's old `function_call`."""
    found = [
        (one.get("id"), one.get("name"), one.get("input", one.get("args", {})))
        for one in _blocks(message)
        if one.get("type") in ("tool_use", "tool_call")
    ]
    old = message.additional_kwargs.get("function_call")
    if not found and isinstance(old, dict):
        found = [(None, old.get("name"), old.get("arguments", {}))]
    calls = []
    for call_id, name, args in found:
        with suppress(ValueError, RecursionError):
            read = json.loads(args or "{}") if isinstance(args, str) else args
            if isinstance(name, str) and isinstance(read, dict):
                calls.append(tool_call(name=name, args=read, id=call_id))
    return calls


def _paired(messages: list[BaseMessage]) -> list[BaseMessage]:
    """Every call has an id, every result that of its call; an unreadable call that was answered is one."""
    answered = {message.tool_call_id for message in messages if isinstance(message, ToolMessage)}
    out: list[BaseMessage] = []
    open_calls: list[Any] = []
    made = 0
    for message in messages:
        if isinstance(message, AIMessage):
            broken = [one for one in message.invalid_tool_calls if one["id"] in answered]
            calls = [
                *message.tool_calls,
                *(tool_call(name=c["name"] or "unknown", args={}, id=c["id"]) for c in broken),
            ]
            named = []
            for call in calls:
                named.append({**call, "id": call["id"] or f"call{made:05d}"})
                made += call["id"] is None or not call["id"]
            open_calls = named or open_calls
            out.append(AIMessage(message.content, tool_calls=named))
        elif isinstance(message, ToolMessage):
            mine = [call for call in open_calls if call["id"] == message.tool_call_id]
            if not mine and not message.tool_call_id:  # by name, as OpenAI's old functions; else in order
                mine = [call for call in open_calls if message.name in (None, call["name"])][:1]
            for call in mine:
                open_calls = [one for one in open_calls if one is not call]
                message = message.model_copy(update={"tool_call_id": call["id"], "name": message.name or call["name"]})
            out.append(message)
        else:
            out.append(message)
    return out


def _as_message(i: int, message: BaseMessage) -> dict[str, Any]:
    out: dict[str, Any] = {"content": str(message.content)}
    if isinstance(message, ToolMessage):
        named = {"name": message.name} if message.name else {}
        return {"role": "tool", **out, "tool_call_id": message.tool_call_id, **named}
    if isinstance(message, ChatMessage):
        return {"role": message.role, **out}
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            out = {"role": role, **out}
            if isinstance(message, AIMessage) and message.tool_calls:
                out["tool_calls"] = [
                    {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["args"]}}
                    for c in message.tool_calls
                ]
            return out
    raise PromptError(f"messages[{i}]", message.type, "a system, human, ai, tool, function or chat message")


def _blocks(message: BaseMessage) -> list[dict[str, Any]]:
    return [one for one in message.content if isinstance(one, dict)] if isinstance(message.content, list) else []


def _text_of(i: int, message: BaseMessage) -> str:
    return _text(i, message.content, type(message))


def _text(i: int, content: object, kind: type[BaseMessage]) -> str:
    """The text of a message's content, which may be null or blocks. Raises `PromptError` for what is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for block in content if isinstance(content, list | tuple) else [content]:
        if isinstance(block, str):
            texts.append(block)
            continue
        named = block.get("type", "text") if isinstance(block, dict) else type(block).__name__
        if isinstance(block, dict) and named in _TEXTS:
            texts.append(str(block.get("text") or ""))
        elif isinstance(block, dict) and issubclass(kind, ToolMessage | FunctionMessage) and named in _DATA:
            texts.append(json.dumps(block.get("json", block.get("value", block.get("data"))), ensure_ascii=False))
        elif not (issubclass(kind, AIMessage) and named in _IGNORED_IN_REPLIES):
            raise PromptError(f"messages[{i}].content", named, "text: this model reads nothing else")
    return "".join(texts)


# -- back from the core


class CallStream:
    """Streamed text with its tool calls taken out: `push(delta)` gives content, and calls once they are complete."""

    def __init__(self, tools: Sequence[dict[str, Any]] = (), *, parallel: bool = True) -> None:
        """`tools` tell the types of arguments that some models write without quotes."""
        self._tools = tools
        self._calls = ToolCallStream(tools)
        self._index = _FIRST_CALL
        self._parallel = parallel

    def push(self, delta: str) -> tuple[str, list[ToolCallChunk]]:
        return self._sorted(self._calls.push(delta))

    def finish(self, text: str) -> tuple[str, list[ToolCallChunk]]:
        """The rest; `text` is the whole reply, whose broken calls come as chunks that LangChain reads as invalid."""
        content, chunks = self._sorted(self._calls.flush())
        for raw in parse_tool_calls(text, self._tools)[2]:
            # LangChain completes cut JSON by itself, and would hand on arguments that nobody wrote.
            chunks.append(tool_call_chunk(name=None, args=f"invalid: {raw}", id=None, index=self._index))
            self._index += 1
        return content, chunks

    def _sorted(self, pieces: list[str | ToolCall]) -> tuple[str, list[ToolCallChunk]]:
        chunks = []
        for piece in pieces:
            if isinstance(piece, ToolCall) and (self._parallel or self._index == _FIRST_CALL):
                args = json.dumps(piece.arguments, ensure_ascii=False)
                chunks.append(tool_call_chunk(name=piece.name, args=args, id=piece.id, index=self._index))
                self._index += 1
        return "".join(piece for piece in pieces if isinstance(piece, str)), chunks


def as_ai_message(
    text: str, tools: Sequence[dict[str, Any]] = (), *, parallel: bool = True, **fields: Any
) -> AIMessage:
    """A whole reply as a message: its content, its calls (or the first), and what was meant as a call but is none."""
    content, calls, invalid = parse_tool_calls(text, tools)
    calls = calls if parallel else calls[:1]
    broken = [invalid_tool_call(name=None, args=raw, id=None, error="not a complete tool call") for raw in invalid]
    return AIMessage(
        content,
        tool_calls=[tool_call(name=call.name, args=call.arguments, id=call.id) for call in calls],
        invalid_tool_calls=broken,
        **fields,
    )
