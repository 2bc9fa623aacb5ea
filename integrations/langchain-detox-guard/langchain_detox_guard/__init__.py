"""LangChain models, middleware and retrieval screens over `detox_guard`. Importing it loads no model."""

from __future__ import annotations

from langchain_detox_guard.chat import ChatDetoxiGen
from langchain_detox_guard.llm import DetoxiGenLLM

__all__ = ["ChatDetoxiGen", "DetoxiGenLLM"]
