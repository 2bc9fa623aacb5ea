"""Tools: how LlamaIndex offers them to an LLM, and how it reads the calls. Knows tools and replies; decodes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.llms.detox_guard.callers import asked_by_a_program
from llama_index.llms.detox_guard.options import Scope, current_scope, entered

import detox_guard
from detox_guard import DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_index.core.chat_engine.types import AgentChatResponse
    from llama_index.core.tools.types import BaseTool

__all__ = ["ToolCalls"]

_CUT = ("length", "guard")


class ToolCalls(FunctionCallingLLM):
    """Tools in, tool calls out, for an LLM whose replies have a `raw` of ours."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        return {
            **kwargs,
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": tool_choice or ("any" if tool_required or asked_by_a_program() else "auto"),
            "allow_parallel_tool_calls": allow_parallel_tool_calls,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls of a reply. Raises ValueError if there are none and `error_on_no_tool_call`.

        Calls that cannot be read stand in `raw["invalid_tool_calls"]`. Raises `IncompleteAnswerError` where one was cut
        off at `max_new_tokens` or broken off by the guard: an agent would take what is left for its answer.
        """
        raw = response.raw if isinstance(response.raw, dict) else {}
        if raw.get("invalid_tool_calls") and raw.get("finish_reason") in _CUT:
            raise detox_guard.IncompleteAnswerError(raw["finish_reason"], raw["invalid_tool_calls"][0], "a tool call")
        calls = [
            ToolSelection.model_validate(
                {"tool_id": block.tool_call_id or "", "tool_name": block.tool_name, "tool_kwargs": block.tool_kwargs}
            )
            for block in response.message.blocks
            if isinstance(block, ToolCallBlock)
        ]
        if not calls and error_on_no_tool_call:
            wrote = "".join([response.message.content or "", *raw.get("invalid_tool_calls", ())])
            raise ValueError(f"the model called no tool; it wrote {wrote[:80]!r}")
        return calls

    def predict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Upstream's. What fails raises, where upstream tells of it as of an answer."""
        failed: list[DetoxGuardError] = []
        with entered(_collecting(failed)):
            response = super().predict_and_call(tools, *args, **kwargs)
        return _unless(failed, response)

    async def apredict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Upstream's. What fails raises, where upstream tells of it as of an answer."""
        failed: list[DetoxGuardError] = []
        with entered(_collecting(failed)):
            response = await super().apredict_and_call(tools, *args, **kwargs)
        return _unless(failed, response)


def _collecting(failed: list[DetoxGuardError]) -> Scope:
    outer = current_scope()
    return Scope(outer.options, outer.collectors, outer, (*outer.failures, failed))


def _unless(failed: list[DetoxGuardError], response: AgentChatResponse) -> AgentChatResponse:
    if failed and not response.sources:
        raise failed[-1]
    return response
