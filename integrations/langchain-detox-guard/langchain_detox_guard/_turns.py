"""Replies of the core as LangChain's messages and chunks. Knows replies and their tool calls; asks nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_detox_guard._identity import generation_info
from langchain_detox_guard.tools import Asked, CallStream, as_ai_message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detox_guard import Chunk, DetoxiGen, Generation, GuardPolicy


class Turn:
    """One streamed reply, as LangChain's chunks."""

    def __init__(self, detoxigen: DetoxiGen, asked: Asked, guard: GuardPolicy | None) -> None:
        self._detoxigen = detoxigen
        self._asked = asked
        self._guard = guard
        self._calls = CallStream(asked.tools, parallel=asked.parallel) if asked.tools else None

    def push(self, chunk: Chunk) -> Iterator[ChatGenerationChunk]:
        """Nothing while a tool call is under way; on the last chunk, usage and metadata."""
        content, calls = self._calls.push(chunk.text) if self._calls else (chunk.text, [])
        if chunk.generation is None:
            if content or calls:
                yield ChatGenerationChunk(message=AIMessageChunk(content=content, tool_call_chunks=calls))
            return
        self._asked.check(chunk.generation.finish_reason)
        if self._calls:
            rest, broken = self._calls.finish(chunk.generation.text)
            content, calls = content + rest, [*calls, *broken]
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content=content,
                tool_call_chunks=calls,
                usage_metadata=_usage(chunk.generation),
                response_metadata=generation_info(self._detoxigen, chunk.generation, self._guard),
                chunk_position="last",
            ),
            generation_info={"finish_reason": chunk.generation.finish_reason},
        )


def result_of(detoxigen: DetoxiGen, reply: Generation, asked: Asked, guard: GuardPolicy | None) -> ChatResult:
    asked.check(reply.finish_reason)
    fields = {"usage_metadata": _usage(reply), "response_metadata": generation_info(detoxigen, reply, guard)}
    message = AIMessage(reply.text, **fields)
    if asked.tools:
        message = as_ai_message(reply.text, asked.tools, parallel=asked.parallel, **fields)
    # No llm_output: LangChain would copy it into `response_metadata`, but only where nothing was streamed.
    return ChatResult(
        generations=[ChatGeneration(message=message, generation_info={"finish_reason": reply.finish_reason})]
    )


def _usage(reply: Generation) -> UsageMetadata:
    usage = reply.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
    )
