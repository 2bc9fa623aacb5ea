"""A reply as it grows, in LlamaIndex's shapes. Knows chunks and tool calls; knows no model and asks nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.llms.detox_guard.events import DetoxInterventionEvent, dispatcher

import detox_guard

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["GrowingReply"]


class GrowingReply:
    """One reply as it grows: what LlamaIndex wants to see of it at any moment."""

    def __init__(
        self,
        model: str,
        collectors: tuple[list[detox_guard.Generation], ...],
        *,
        tools: Sequence[dict[str, Any]],
        parallel: bool,
        whole: bool,
    ) -> None:
        """`whole`: what was cut or broken off is of no use."""
        self.delta = ""
        self._whole = whole
        self._model = model
        self._collectors = collectors
        self._parser = detox_guard.ToolCallStream(tools) if tools else None
        self._most_calls = None if parallel else 1
        self._text = ""
        self._calls: list[detox_guard.ToolCall] = []
        self._raw: dict[str, Any] | None = None

    def push(self, chunk: detox_guard.Chunk) -> bool:
        """Take a chunk in; is there something new to show? Raises `IncompleteAnswerError`."""
        pieces: list[Any] = self._parser.push(chunk.text) if self._parser else [chunk.text]
        if chunk.generation:
            pieces += self._parser.flush() if self._parser else []
            self._finish(chunk.generation)
        self.delta = "".join(piece for piece in pieces if isinstance(piece, str))
        self._text += self.delta
        calls = [piece for piece in pieces if not isinstance(piece, str)]
        self._calls = [*self._calls, *calls][: self._most_calls]
        return bool(self.delta or calls or chunk.generation)

    def as_completion(self) -> CompletionResponse:
        return CompletionResponse(text=self._text, delta=self.delta, raw=self._raw)

    def as_chat(self) -> ChatResponse:
        blocks = [TextBlock(text=self._text)] if self._text or not self._calls else []
        calls = [
            ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=call.arguments) for call in self._calls
        ]
        # Upstream's streaming programs look for calls here, and only whether there are any.
        extra = {"tool_calls": [call.model_dump(mode="json") for call in calls]} if calls else {}
        message = ChatMessage(role=MessageRole.ASSISTANT, content=[*blocks, *calls], additional_kwargs=extra)
        return ChatResponse(message=message, delta=self.delta, raw=self._raw)

    def _finish(self, generation: detox_guard.Generation) -> None:
        usage = generation.usage
        self._raw = {
            "model": self._model,
            "finish_reason": generation.finish_reason,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.total_tokens,
            },
            "detox": generation.summary(),
        }
        if self._parser is not None and self._parser.invalid:
            self._raw["invalid_tool_calls"] = list(self._parser.invalid)
        for collector in self._collectors:
            collector.append(generation)
        for taken in generation.interventions:
            dispatcher.event(
                DetoxInterventionEvent(
                    where="decode",
                    score=taken.score,
                    action=taken.action,
                    alpha=taken.alpha,
                    next_alpha=taken.next_alpha,
                )
            )
        if self._whole and generation.finish_reason != "stop":
            raise detox_guard.IncompleteAnswerError(generation.finish_reason, generation.text)
