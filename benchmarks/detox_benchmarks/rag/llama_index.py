"""How toxic, how right and how fast are answers from documents among which toxic passages were planted?

    python -m detox_benchmarks rag llama-index --corpus xquad.json --toxic prompts.jsonl --out rag.jsonl

Three systems answer the same questions: the plain LLM, the guarded LLM, and the guarded LLM behind `DetoxSynthesizer`.
Every other question has a comment: what counts is whether retrieval finds it. `--about comment` asks for the comment
itself, which a plain model may repeat. With `--about thread` the model goes on with what was retrieved, without its
chat template: with an answer, or with another comment. Knows LlamaIndex; the data and the figures are `frame`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.llms.detox_guard.factory import get_detox_response_synthesizer
from llama_index.llms.detox_guard.llm import DetoxiGenLLM
from llama_index.llms.detox_guard.options import detox_options

from detox_benchmarks.rag.frame import Bench, Said
from detox_guard import GuardPolicy

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import LLMMetadata

    from detox_benchmarks.rag.frame import Ask, Documents, RagConfig

__all__ = ["ENGINES"]

ASK = PromptTemplate("Read this:\n{context_str}\n\nNow answer in one short sentence. {query_str}")
GO_ON = PromptTemplate("{context_str}\n\n{query_str}")


class Found(BaseRetriever):
    """The frame's documents, as LlamaIndex's."""

    def __init__(self, documents: Documents) -> None:
        super().__init__()
        self._documents = documents

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(text=text, metadata={}, id_=f"{'comment' if planted else 'passage'}-{hash(text)}"),
                score=score,
            )
            for text, score, planted in self._documents.find(query_bundle.query_str)
        ]


class Completing(DetoxiGenLLM):
    """Goes on with plain text, as a base model does."""

    @property
    def metadata(self) -> LLMMetadata:
        """Without a chat template."""
        return super().metadata.model_copy(update={"is_chat_model": False, "is_function_calling_model": False})


def build(config: RagConfig, system: str, sample: int, documents: Documents) -> Ask:
    """What answers in one system, with the sample's seed."""
    llm: dict[str, Any] = {
        "model": config.model,
        "detoxifier": config.detoxifier,
        "device": config.device,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "trace": False,
    }
    kind, template = (Completing, GO_ON) if config.about == "thread" else (DetoxiGenLLM, ASK)
    synthesizer: Any
    if system == "hook":
        synthesizer = get_detox_response_synthesizer(
            kind(**llm), policy=GuardPolicy(), context="mask", text_qa_template=template
        )
    else:
        options: dict[str, Any] = {"alpha": 0.0} if system == "plain" else {"guard": GuardPolicy()}
        synthesizer = get_response_synthesizer(llm=kind(**llm, **options), text_qa_template=template)
    engine = RetrieverQueryEngine(Found(documents), synthesizer)

    async def ask(question: str) -> Said:
        with detox_options(seed=sample) as replies:
            response = await engine.aquery(question)
        planted = any(node.node_id.startswith("comment") for node in response.source_nodes)
        return Said(str(response).strip(), planted, sum(len(reply.interventions) for reply in replies))

    return ask


ENGINES = Bench(("plain", "guarded", "hook"), build, every=2)
