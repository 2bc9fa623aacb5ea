"""The retriever screen and the guarded RAG chain, on scripted words."""

from __future__ import annotations

from typing import Any

import pytest
from detox_guard import InvalidParamsError, ScorerError
from detox_guard.testing import ScriptedDetoxiGen  # noqa: TC002
from langchain_core.documents import Document
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import create_retriever_tool

from langchain_detox_guard import (
    ChatDetoxiGen,
    DetoxDocumentScreen,
    DetoxiGenLLM,
    DetoxRetriever,
    create_detox_rag_chain,
)
from langchain_scripts import ROTTEN

DOCUMENTS = [
    Document("The market opens at nine. The rotten clerk sleeps until ten.", metadata={"source": "a"}),
    Document("Rivers rise in the hills.", metadata={"source": "b"}),
]


class Fixed(BaseRetriever):
    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return DOCUMENTS


def screen_with(action: Any) -> DetoxDocumentScreen:
    return DetoxDocumentScreen(action=action, scorer=ROTTEN)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("action", "sources", "says_rotten"), [("drop", "b", False), ("mask", "ab", False), ("mark", "ab", True)]
)
async def test_the_screen(action: str, sources: str, says_rotten: bool, is_async: bool) -> None:
    chain = Fixed() | screen_with(action)
    out = await chain.ainvoke("market") if is_async else chain.invoke("market")
    assert "".join(one.metadata["source"] for one in out) == sources
    assert any("rotten" in one.page_content for one in out) == says_rotten
    assert [one.metadata["toxicity_flagged"] for one in out] == [source == "a" for source in sources]
    assert all(0 <= one.metadata["toxicity"] <= 1 for one in out)
    if action == "mask":
        assert out[0].page_content.startswith("The market opens at nine.")
    assert "rotten" in DOCUMENTS[0].page_content
    assert "toxicity" not in DOCUMENTS[0].metadata


def test_a_scorer_that_fails_passes_nothing() -> None:
    class Broken:
        name = "broken"

        def score(self, texts: Any) -> list[float]:
            raise RuntimeError("no")

    with pytest.raises(ScorerError):
        (Fixed() | DetoxDocumentScreen(scorer=Broken())).invoke("market")


@pytest.mark.parametrize("bad", [{"action": "hide"}, {"threshold": 2}, {"treshold": 0.5}])
def test_bad_fields_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))):
        DetoxDocumentScreen(**bad)


async def test_the_retriever_goes_where_retrievers_go() -> None:
    retriever = DetoxRetriever(retriever=Fixed(), screen=screen_with("drop"))
    assert [one.metadata["source"] for one in retriever.invoke("market")] == ["b"]
    assert [one.metadata["source"] for one in await retriever.ainvoke("market")] == ["b"]
    tool = create_retriever_tool(retriever, "notes", "The notes.")
    assert tool.invoke("market") == "Rivers rise in the hills."


async def test_the_chain_reads_only_what_was_screened(detoxigen: ScriptedDetoxiGen) -> None:
    chain = create_detox_rag_chain(Fixed(), ChatDetoxiGen(detoxigen=detoxigen, seed=1), screen=screen_with("mask"))
    out = chain.invoke("When does it open?")
    assert out.keys() == {"input", "context", "answer"}
    read = detoxigen.calls[-1][1].messages[0]["content"]
    assert "[1] The market opens at nine." in read
    assert "[2] Rivers" in read
    assert "rotten" not in read
    assert "rotten" not in str(out["context"])
    assert (await chain.ainvoke({"input": "When does it open?"}))["answer"] == out["answer"]
    pieces = list(chain.stream("When does it open?"))
    assert "".join(piece.get("answer", "") for piece in pieces) == out["answer"]
    assert sum("answer" in piece for piece in pieces) > 3


def test_the_chain_takes_an_llm_and_a_prompt(detoxigen: ScriptedDetoxiGen) -> None:
    prompt = PromptTemplate.from_template("{context}\n{tone} answer to {input}:")
    chain = create_detox_rag_chain(
        Fixed(), DetoxiGenLLM(detoxigen=detoxigen, seed=1), prompt=prompt, screen=screen_with("drop")
    )
    chain.invoke({"input": "Where?", "tone": "Kind"})
    assert detoxigen.calls[-1][1] == "[1] Rivers rise in the hills.\nKind answer to Where?:"
