"""LangChain models, middleware and retrieval screens over `detox_guard`. Importing it loads no model.

`DetoxMiddleware` needs LangChain's agents: `pip install 'langchain-detox-guard[agents]'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard import IncompleteAnswerError

from langchain_detox_guard.chat import ChatDetoxiGen
from langchain_detox_guard.llm import DetoxiGenLLM
from langchain_detox_guard.retrieval import DetoxDocumentScreen, DetoxRetriever, create_detox_rag_chain

if TYPE_CHECKING:
    from langchain_detox_guard.middleware import DetoxMiddleware

__all__ = [
    "ChatDetoxiGen",
    "DetoxDocumentScreen",
    "DetoxMiddleware",
    "DetoxRetriever",
    "DetoxiGenLLM",
    "IncompleteAnswerError",
    "create_detox_rag_chain",
]


def __getattr__(name: str) -> object:
    if name != "DetoxMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from langchain_detox_guard.middleware import DetoxMiddleware

    return DetoxMiddleware
