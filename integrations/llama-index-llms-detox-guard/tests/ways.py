"""The eight ways to ask an LLM of LlamaIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.llms import ChatMessage
from llama_index_harness import QUERY

if TYPE_CHECKING:
    from llama_index.llms.detox_guard import DetoxiGenLLM

HELLO = [ChatMessage(QUERY)]


WAYS = ["complete", "stream_complete", "chat", "stream_chat", "acomplete", "astream_complete", "achat", "astream_chat"]


async def ask(llm: DetoxiGenLLM, way: str, **kwargs: Any) -> list[Any]:
    """Every response of one call, whichever of the eight ways it is."""
    result = getattr(llm, way)(QUERY if "complete" in way else HELLO, **kwargs)
    if way.startswith("a"):
        result = await result
    if way.startswith("stream"):
        return list(result)
    if way.startswith("astream"):
        return [response async for response in result]
    return [result]
