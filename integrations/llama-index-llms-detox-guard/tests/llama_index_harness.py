"""A scripted engine with the surface of `DetoxiGen`, foreign LLMs, a word scorer and event recorders for the tests."""

from __future__ import annotations

import asyncio
import threading
import time
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

from detox_guard import Chunk, DecodingParams, Generation, Steering, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from llama_index.core.callbacks.schema import CBEventType
    from llama_index.core.instrumentation.events import BaseEvent

CLEAN = "The library opens at nine. It closes at six."
RUDE = "The library opens at nine. Only a stupid person asks. It closes at six."
HELD = "The library opens at nine. [removed] It closes at six."


class WordScorer:
    """.9 for a text with the word "stupid", else .1."""

    name = "word"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [0.9 if "stupid" in text.lower() else 0.1 for text in texts]


class FakeEngine:
    """Answers from a script, a word at a time, and keeps what it was asked.

    `script`: replies in turn (the last one for ever after), or a function of the prompt; an exception is raised after
    the first word. `delay_s` between words. `finish` is why they end. `seats` are requests under way, `peak` the most
    there were.
    """

    def __init__(
        self,
        script: Any = (CLEAN,),
        *,
        chat: bool = True,
        tools: bool = True,
        context_window: int | None = 2048,
        delay_s: float = 0.0,
        interventions: Sequence[Any] = (),
        finish: str = "stop",
        model_id: str = "fake-model",
    ) -> None:
        self.script = script if callable(script) else list(script)
        self.has_chat_template = chat
        self.supports_tools = tools
        self.context_window = context_window
        self.params = DecodingParams(max_new_tokens=64)
        self.streams = ("a stream",)
        self.asked: list[tuple[Any, DecodingParams]] = []
        self.seats = self.peak = 0
        self._delay_s = delay_s
        self._interventions = tuple(interventions)
        self.finish = finish
        self.model_id = model_id
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def stream(self, prompt: Any, params: DecodingParams) -> Iterator[Chunk]:
        words, error = self._begin(prompt, params)

        def chunks() -> Iterator[Chunk]:
            self._seat(1)
            try:
                for word in words:
                    time.sleep(self._delay_s)
                    yield Chunk(word)
                if error:
                    raise error
                yield self._last(prompt, params, words)
            finally:
                self._seat(-1)

        return chunks()

    async def astream(self, prompt: Any, params: DecodingParams) -> AsyncIterator[Chunk]:
        words, error = self._begin(prompt, params)
        self._seat(1)
        try:
            for word in words:
                await asyncio.sleep(self._delay_s)
                yield Chunk(word)
            if error:
                raise error
            yield self._last(prompt, params, words)
        finally:
            self._seat(-1)

    def _begin(self, prompt: Any, params: DecodingParams) -> tuple[list[str], Exception | None]:
        with self._lock:
            index = len(self.asked)
            self.asked.append((prompt, params))
        reply = self.script(prompt) if callable(self.script) else self.script[min(index, len(self.script) - 1)]
        if isinstance(reply, Exception):
            return ["One "], reply
        for stop in params.stop:
            reply = reply.split(stop)[0]
        return [word + " " for word in reply.split(" ")[:-1]] + [reply.split(" ")[-1]], None

    def _seat(self, change: int) -> None:
        with self._lock:
            self.seats += change
            self.peak = max(self.peak, self.seats)

    def _last(self, prompt: Any, params: DecodingParams, words: list[str]) -> Chunk:
        text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt.messages)
        usage = Usage(len(self.encode(text)), len(words), 3 * len(self._interventions))
        steering = Steering(params.alpha, params.rule, ("-1:0123456789ab",), 0.5, 0.1, 1, 0)
        return Chunk("", Generation("".join(words), self.finish, usage, 7, None, steering, self._interventions))


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
