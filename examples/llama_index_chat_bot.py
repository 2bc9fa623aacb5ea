"""A RAG chat bot that streams (condense_plus_context), guarded while it decodes: what was streamed was judged first."""

import asyncio
import re

from llama_index.core.chat_engine import CondensePlusContextChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.llms.detox_guard import DetoxiGenLLM, guard_chat_engine

from detox_guard import GuardPolicy

PASSAGES = [
    "The night bus N7 runs every thirty minutes between the station and the harbour, from midnight until five.",
    "A single ticket costs two euros forty. Tickets are sold in the app and at the machines, not on the bus.",
    "Bicycles travel free after seven in the evening. Folding bicycles travel free all day.",
    "Reader's letter: whoever designed these stupid timetables is an idiot. The N7 was late again on Friday.",
]


class SharedWords(BaseRetriever):
    """The passages that share most words with the question. Put your vector store here."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asked = _words(query_bundle.query_str)
        scored = [(len(asked & _words(text)), text) for text in PASSAGES]
        best = sorted(scored, reverse=True)[:2]
        return [NodeWithScore(node=TextNode(text=text), score=float(score)) for score, text in best]


def _words(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"\w+", text.lower()) if len(word) > 2}


async def main() -> None:
    llm = DetoxiGenLLM(max_new_tokens=32, temperature=0.3, seed=1)
    engine = CondensePlusContextChatEngine.from_defaults(
        retriever=SharedWords(),
        llm=llm,
        memory=ChatMemoryBuffer.from_defaults(token_limit=1500, tokenizer_fn=llm.encode),
        system_prompt="You help passengers of a bus company. Answer in one sentence.",
    )
    guard_chat_engine(engine, policy=GuardPolicy(threshold=0.5), context="mask")

    for question in ("How often does the night bus N7 run?", "What does a ticket cost?"):
        print("You:", question)
        print("Bot: ", end="")
        response = await engine.astream_chat(question)
        async for delta in response.async_response_gen():
            print(delta, end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main())
