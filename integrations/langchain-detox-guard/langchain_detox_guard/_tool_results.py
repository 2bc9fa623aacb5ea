"""What a tool returns, screened before the state and the model have it. Knows messages and commands; asks no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from detox_guard import SCREEN_NOTE
from langchain_core.messages import AIMessage, BaseMessage, RemoveMessage, ToolMessage, convert_to_messages
from langgraph.types import Command, Overwrite

from langchain_detox_guard._reading import Read, clean_call, read_words
from langchain_detox_guard._words import replaced

if TYPE_CHECKING:
    from detox_guard import ToxicityScorer

_DROPPED = object()
"""Instead of a value that does not come into the state."""


@dataclass(frozen=True)
class ToolResults:
    """How results are screened: `action` as in `DetoxMiddleware(tool_results=…)`."""

    action: Literal["mask", "drop", "mark"] | None
    scorer: str | ToxicityScorer | None
    threshold: float

    def _read(self, value: Any, known: frozenset[str] = frozenset()) -> Read:
        return read_words(value, self.scorer, self.threshold, known)

    def screened(self, result: Any) -> Any:
        """A message or command, or a list of them: LangGraph's tools may return one, whatever the hook's type says."""
        if self.action is None:
            return result
        if isinstance(result, list):
            return [self.screened(one) for one in result]
        if isinstance(result, ToolMessage):
            message, records = self._message(result)
            return Command(update={"messages": [message], "detox": records}) if records else result
        if not isinstance(result.update, dict):
            return result
        update, records = dict(result.update), list[dict[str, Any]]()
        for key, value in result.update.items():
            if key == "messages":
                whole = isinstance(value, Overwrite)
                messages, found = self._messages(value.value if whole else value)
                screened: Any = Overwrite(messages) if whole else messages
            elif key == "detox":
                continue
            else:
                screened, found = self._value(key, value)
            if found:
                update[key] = screened
                records += found
        if not records:
            return result
        update = {key: value for key, value in update.items() if value is not _DROPPED}
        update["detox"] = [*result.update.get("detox", ()), *records]
        return Command(graph=result.graph, update=update, resume=result.resume, goto=result.goto)

    def _messages(self, said: Any) -> tuple[list[BaseMessage], list[dict[str, Any]]]:
        """One or several messages, in any form that LangGraph takes."""
        many = isinstance(said, list) or (isinstance(said, tuple) and all(isinstance(one, BaseMessage) for one in said))
        messages, records = [], list[dict[str, Any]]()
        for one in said if many else [said] if said else []:
            # Whatever role and form the tool gave it: the model reads it next.
            (message,) = [one] if isinstance(one, RemoveMessage) else convert_to_messages([one])
            message, found = self._message(message)
            messages.append(message)
            records += found
        return messages, records

    def _value(self, key: str, value: Any) -> tuple[Any, list[dict[str, Any]]]:
        """What a tool puts elsewhere into the state."""
        read = self._read(value)
        if not read.flagged:
            return value, []
        record = {"where": "tool", "key": key, "score": read.score, "action": self.action}
        if self.action == "mark":
            return value, [record]
        return _DROPPED if self.action == "drop" else replaced(value, read.masked), [record]

    def _message(self, message: BaseMessage) -> tuple[BaseMessage, list[dict[str, Any]]]:
        """The message that may be read, and a record if it was flagged. A result of several blocks becomes one text."""
        # Its tool's name is the developer's, its id that of the call.
        known = {one for one in (message.name, getattr(message, "tool_call_id", None)) if one is not None}
        read = self._read(message, frozenset(known))
        if not read.flagged:
            return message, []
        record = {
            "where": "tool", "tool": message.name, "tool_call_id": getattr(message, "tool_call_id", None),
            "score": read.score, "action": self.action,
        }  # fmt: skip
        if self.action == "mark":
            return message, [record]
        drop = self.action == "drop"
        kept: dict[str, Any] = {"content": message.content, "additional_kwargs": {}}
        kept["response_metadata"] = replaced(message.response_metadata, read.masked)
        if drop:
            kept["content"] = SCREEN_NOTE
        elif read.flags({"content": message.content}, envelope=True):
            text = str(message.text)
            # Flagged words outside of any text (a block of JSON, say) leave nothing to mask sentence by sentence.
            whole = isinstance(message.content, list) and not read.flags(text)
            kept["content"] = SCREEN_NOTE if whole else read.masked(text)
        if isinstance(message, ToolMessage):
            kept["artifact"] = None if drop else replaced(message.artifact, read.masked)
        if isinstance(message, AIMessage):
            kept["tool_calls"] = [clean_call(call, read) for call in message.tool_calls]
            kept["invalid_tool_calls"] = []
        return message.model_copy(update=kept), [record]
