"""LlamaIndex messages and tools in, the core's prompts out. Knows both vocabularies; knows no model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import CachePoint, MessageRole, TextBlock, ThinkingBlock, ToolCallBlock

from detox_guard import PromptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_index.core.llms import ChatMessage

__all__ = ["is_react", "to_core_messages"]

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}
_PLAIN = {"role", "content"}
"""What a message has that neither calls a tool nor answers a call."""
_REACT_MARK = "Observation:"


def to_core_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """OpenAI-style messages; runs of one role become one, because many templates insist on turns.

    Raises `PromptError` for blocks that a text model cannot read: they are never dropped.
    """
    names: dict[str, str] = {}
    out: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        core: dict[str, Any] = {
            "role": _ROLES.get(message.role, message.role.value),
            "content": _text(index, message),
        }
        calls = _calls_of(message)
        if calls:
            core["tool_calls"] = calls
            names |= {call["id"]: call["function"]["name"] for call in calls}
        if core["role"] == "tool":
            call_id = str(message.additional_kwargs.get("tool_call_id") or "")
            core |= {"tool_call_id": call_id, "name": message.additional_kwargs.get("name") or names.get(call_id, "")}
        if out and out[-1].keys() == core.keys() == _PLAIN and out[-1]["role"] == core["role"]:
            out[-1]["content"] = "\n".join(filter(None, (out[-1]["content"], core["content"])))
        else:
            out.append(core)
    return out


def is_react(messages: Sequence[ChatMessage]) -> bool:
    """The system message lays out the ReAct protocol, in which the caller writes the observations, not the model."""
    return any(
        message.role in (MessageRole.SYSTEM, MessageRole.DEVELOPER) and _REACT_MARK in (message.content or "")
        for message in messages
    )


def _text(index: int, message: ChatMessage) -> str:
    texts = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text or "")
        elif not isinstance(block, ToolCallBlock | ThinkingBlock | CachePoint):
            raise PromptError(
                f"messages[{index}].blocks", type(block).__name__, "text, tool calls and thinking are all it reads"
            )
    return "\n".join(texts)


def _calls_of(message: ChatMessage) -> list[dict[str, Any]]:
    """The calls in its blocks; or else those that other LLMs keep beside them, as whoever wrote them lays them out."""
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    if blocks:
        return [_call(block.tool_call_id, block.tool_name, block.tool_kwargs) for block in blocks]
    kept = message.additional_kwargs.get("tool_calls")
    calls = []
    for call in kept if isinstance(kept, list | tuple) else ():
        function = _part(call, "function")
        name = _part(function, "name") or _part(call, "name") or _part(call, "tool_name")
        arguments = (
            _part(function, "arguments")
            or _part(call, "input")
            or _part(call, "args")
            or _part(call, "arguments")
            or _part(call, "tool_kwargs")
        )
        if name:
            call_id = _part(call, "id") or _part(call, "tool_call_id") or _part(call, "tool_id")
            calls.append(_call(call_id, str(name), arguments))
    return calls


def _part(value: Any, name: str) -> Any:
    """Of a dict, or of a provider's object."""
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _call(call_id: Any, name: str, arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):  # LLMs that stream arguments as text leave them so in the memory
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            arguments = {"arguments": arguments}
    if not isinstance(arguments, dict):
        arguments = {} if arguments is None else {"arguments": arguments}
    return {
        "id": str(call_id or ""),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
