"""A query engine over a folder of notes: `Settings.llm = DetoxiGenLLM()`, and nothing else in the program changes."""

import itertools
import re
import zlib

import numpy as np
from llama_index.core import Document, PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.llms.detox_guard import DetoxiGenLLM, DetoxNodePostprocessor

NOTES = {
    "opening hours": "The town library opens at nine on weekdays and at ten on Saturdays. It is closed on Sundays.",
    "membership": "A library card is free for residents. Visitors pay five pounds a year and need proof of address.",
    "complaint": "I was told to pay a fine of two pounds. The clerk is a stupid idiot and everybody there is an idiot.",
    "fines": "A book that is late costs ten pence a day, at most two pounds. Children's books are never fined.",
}
QUESTION = PromptTemplate("Read this:\n{context_str}\n\nNow answer in one sentence. {query_str}")


class WordHashes(BaseEmbedding):
    """A local embedding of a few lines: hashed words and word pairs. Put a real embedding model here."""

    def _get_text_embedding(self, text: str) -> list[float]:
        words = [word.rstrip("s") for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 2]
        vector = np.full(512, 1e-6)
        for feature in [*words, *map(" ".join, itertools.pairwise(words))]:
            vector[zlib.crc32(feature.encode()) % 512] += 1
        return (vector / np.linalg.norm(vector)).tolist()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def main() -> None:
    llm = DetoxiGenLLM(max_new_tokens=32, temperature=0.3, seed=1)
    Settings.llm, Settings.embed_model = llm, WordHashes()
    Settings.tokenizer = llm.encode  # prompts are packed by the model's own tokens
    documents = [Document(text=text, metadata={"title": title}) for title, text in NOTES.items()]
    index = VectorStoreIndex.from_documents(documents)
    engine = index.as_query_engine(
        similarity_top_k=2,
        text_qa_template=QUESTION,  # the default model is small: it reads plain prompts best
        node_postprocessors=[DetoxNodePostprocessor(action="mask")],
    )

    for question in ("When does the library open on Saturdays?", "Who has to pay a fine of two pounds?"):
        response = engine.query(question)
        print("Q:", question)
        print("A:", str(response).strip())
        for source in response.source_nodes:
            print("  from", source.node.metadata["title"], "|", source.node.get_content()[:100])


if __name__ == "__main__":
    main()
