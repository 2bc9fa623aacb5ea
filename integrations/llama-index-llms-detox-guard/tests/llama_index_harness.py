"""For these tests: the scripted model, an LLM of someone else's, embeddings, and what records events."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import NodeWithScore, TextNode

from detox_guard import DecodingParams, GuardPolicy
from detox_guard.testing import Said, ScriptedDetoxiGen, ScriptedScorer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_index.core.callbacks.schema import CBEventType
    from llama_index.core.instrumentation.events import BaseEvent

POLICY = GuardPolicy(scorer=ScriptedScorer("stupid"))
QUERY = "When does the library open?"
CLEAN = "The library opens at nine. It closes at six."
RUDE = "The library opens at nine. Only a stupid person asks. It closes at six."
HELD = "The library opens at nine. [removed] It closes at six."


def scripted(script: Any = (CLEAN,), *, finish: Any = None, **options: Any) -> ScriptedDetoxiGen:
    """The scripted model as these tests want it. `finish` is why its replies end."""

    def ended(*asked: Any) -> Said:
        return Said(script(*asked) if callable(script) else script[0], finish_reason=finish)

    return ScriptedDetoxiGen(ended if finish else script, params=DecodingParams(max_new_tokens=64), **options)


class ForeignLLM(CustomLLM):
    """An LLM of someone else's: `CustomLLM` as its documentation shows it, in sentences."""

    text: str = RUDE

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(context_window=2048, num_output=64, model_name="foreign")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=self.text)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        def words() -> Iterator[CompletionResponse]:
            so_far = ""
            for word in self.text.split(" "):
                delta = word if not so_far else " " + word
                so_far += delta
                yield CompletionResponse(text=so_far, delta=delta)

        return words()


class BagEmbedding(BaseEmbedding):
    """Deterministic hashed bag of letters: enough for a retriever to have an order."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [1e-3] * 32
        for word in text.lower().split():
            vector[sum(word.encode()) % 32] += 1.0
        return vector

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class Events(BaseEventHandler):
    """Instrumentation events, in order."""

    seen: list[Any]

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.seen.append(event)

    def named(self, name: str) -> list[Any]:
        return [event for event in self.seen if event.class_name() == name]


@contextmanager
def recorded_events() -> Iterator[Events]:
    handler, root = Events(seen=[]), get_dispatcher()
    root.add_event_handler(handler)
    try:
        yield handler
    finally:
        root.event_handlers.remove(handler)


class Callbacks(BaseCallbackHandler):
    """Old-style callbacks: names of what started and ended."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.started: list[CBEventType] = []
        self.ended: list[CBEventType] = []

    def on_event_start(self, event_type: CBEventType, *args: Any, **kwargs: Any) -> str:
        self.started.append(event_type)
        return str(kwargs.get("event_id", ""))

    def on_event_end(self, event_type: CBEventType, *args: Any, **kwargs: Any) -> None:
        self.ended.append(event_type)

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...


def memory() -> ChatMemoryBuffer:
    """A memory without a database: upstream's default one leaves its connection open."""
    return ChatMemoryBuffer.from_defaults(token_limit=1000, tokenizer_fn=str.split)


def nodes(*texts: str) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=f"n{i}"), score=1.0) for i, text in enumerate(texts)]
