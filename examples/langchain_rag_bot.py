"""A bot over documents: found by BM25, screened before the model reads them, answered under steering, streamed."""

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_detox_guard import ChatDetoxiGen, DetoxDocumentScreen, create_detox_rag_chain
from rank_bm25 import BM25Okapi

PASSAGES = {
    "history": "The lighthouse on Skarholm was built in 1874 of grey granite from the island's own quarry. Its lamp "
    "burned rapeseed oil until 1911, when it was changed to gas. Since 1968 it is electric and needs no keeper.",
    "ferry": "The ferry from Hamnvik to Skarholm takes 40 minutes. From May to September it leaves every day at 9:00 "
    "and 14:30; in winter only on Saturdays. Bicycles travel free of charge, cars are not allowed on the island.",
    "birds": "More than 120 kinds of birds have been counted on Skarholm. Guillemots nest on the western cliffs from "
    "April to July, and during these months the cliff path is closed to visitors.",
    "guestbook": "The soup at the harbour café was hot and the view was lovely. Only stupid idiots would pay for that "
    "ugly museum. We came back to the pier in time for the last ferry at 18:00.",
    "stay": "There are two places to stay: the old school with twelve beds, and a camping ground beside the harbour. "
    "Both are closed from November to March. Open fires are forbidden everywhere on the island.",
}


def words(text: str) -> list[str]:
    return [word.strip(".,;:?!'").lower() for word in text.split()]


class BM25Retriever(BaseRetriever):
    """The `k` passages that share the most telling words with the question."""

    k: int = 2

    def _get_relevant_documents(self, query: str, **_: object) -> list[Document]:
        scores = BM25Okapi([words(text) for text in PASSAGES.values()]).get_scores(words(query))
        ranked = sorted(zip(scores, PASSAGES, strict=True), reverse=True)
        return [Document(PASSAGES[name], metadata={"source": name}) for _, name in ranked[: self.k]]


def main() -> None:
    bot = create_detox_rag_chain(
        BM25Retriever(),
        ChatDetoxiGen(max_tokens=32, temperature=0.0),
        screen=DetoxDocumentScreen(action="mask"),  # or "drop", or "mark"
    )
    for question in ("When was the lighthouse built?", "How was the soup at the café, and is the museum good?"):
        print("question:", question)
        answering = False
        for piece in bot.stream(question):
            for document in piece.get("context", ()):
                meta = document.metadata
                flag = "  <- masked: " + document.page_content if meta["toxicity_flagged"] else ""
                print(f"  read {meta['source']} (toxicity {meta['toxicity']:.2f}){flag}")
            if piece.get("answer") and not answering:
                answering = True
                print("  answer: ", end="")
            print(piece.get("answer", ""), end="", flush=True)
        print("\n")


if __name__ == "__main__":
    main()
