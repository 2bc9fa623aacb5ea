"""For the tests of `detox_options`: engines under them, and streams read in fresh contexts."""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.llms.detox_guard import DetoxiGenLLM
from llama_index_harness import POLICY, QUERY, BagEmbedding
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from detox_guard.testing import ScriptedDetoxiGen


HELLO = [ChatMessage(QUERY)]


class Opening(BaseModel):
    hour: int


def index_of(engine: ScriptedDetoxiGen, *texts: str) -> VectorStoreIndex:
    Settings.llm = DetoxiGenLLM(detoxigen=engine)
    Settings.tokenizer = Settings.llm.encode
    documents = [Document(text=text) for text in texts or ("The library opens at nine.",)]
    return VectorStoreIndex.from_documents(documents, embed_model=BagEmbedding())


def held_by(engine: ScriptedDetoxiGen, seed: int = 7) -> None:
    assert engine.calls
    assert {(params.guard, params.seed) for *_, params in engine.calls} == {(POLICY, seed)}


def read_fresh(stream: Iterator[Any]) -> list[Any]:
    """Each step in an empty context and a thread of its own, as web servers step a generator."""
    out, done = [], object()
    with ThreadPoolExecutor(2) as pool:
        while (item := pool.submit(contextvars.Context().run, next, stream, done).result()) is not done:
            out.append(item)
    return out


async def aread_fresh(stream: AsyncIterator[Any]) -> list[Any]:
    out, done = [], object()
    while (
        item := await asyncio.create_task(anext(stream, done), context=contextvars.Context())  # type: ignore[arg-type]
    ) is not done:
        out.append(item)
    return out
