"""A stand-in for `detox_guard.DetoxiGen` with the same surface: scripted words instead of a model.

What it says depends on the prompt, alpha and seed alone, so caches, overrides and streams can be told apart. It counts
what it was asked for, notices when a stream is abandoned, and fails where a test wants it to.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import TYPE_CHECKING, Any

from detox_guard import (
    ChatPrompt,
    Chunk,
    DecodingParams,
    DetoxGuardError,
    Generation,
    PromptTooLongError,
    Steering,
    StepError,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Sequence

WINDOW = 2048


def example(schema: dict[str, Any], said: str = "", name: str = "") -> Any:
    """A small value that fits a schema; what the prompt quotes goes into strings, as a model with wits would do."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return example(schema[key][0], said, name)
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {key: example(part, said, key) for key, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [example(schema.get("items", {"type": "string"}), said)] * max(1, schema.get("minItems", 1))
    quoted = re.findall(r"'([^']+)'", said)
    fixed: dict[str, Any] = {"string": quoted[-1] if quoted else f"some {name}".strip(), "integer": 3, "number": 1.5}
    return {**fixed, "boolean": True, "null": None}[kind]


class ScriptedEngine:
    """`script(prompt, params)` gives the whole text; by default it greets, calls the first tool, or fills a grammar."""

    model_id = "scripted/words"
    detoxifier_ids: tuple[str, ...] = ("-1:0123abcd0123",)
    has_chat_template = True
    supports_tools = True
    context_window = WINDOW
    closed = False

    def __init__(
        self,
        script: Callable[[Any, DecodingParams], str] | None = None,
        *,
        step_s: float = 0.0,
        params: DecodingParams | None = None,
    ) -> None:
        self.script = script or self.default_script
        self.params = params or DecodingParams()
        self.step_s = step_s
        self.calls: list[tuple[str, Any, DecodingParams]] = []
        self.batch_sizes: list[int] = []
        self.active = 0
        self.most_active = 0
        self.abandoned = 0
        self._lock = threading.Lock()

    # -- what it says

    @staticmethod
    def default_script(prompt: Any, params: DecodingParams) -> str:
        messages = prompt.messages if isinstance(prompt, ChatPrompt) else []
        said = messages[-1]["content"] if messages else prompt
        grammar = params.grammar
        if grammar is not None:
            body = json.loads(grammar.body)
            if grammar.kind == "tool_calls":
                name, parameters = body[0]
                return call_text(name, example(parameters, said))
            if body == {"type": "object"}:
                return json.dumps({"setup": "some setup", "punchline": "some punchline"})
            return json.dumps(example(body, said), ensure_ascii=False)
        if isinstance(prompt, ChatPrompt) and prompt.tools and messages[-1]["role"] == "user":
            function = prompt.tools[0]["function"]
            return "Let me see.\n" + call_text(function["name"], example(function["parameters"], said))
        return f"Hello, dear reader! {said[:20]!r} at alpha {params.alpha:g} with seed {params.seed} is fine by me."

    # -- the surface of DetoxiGen

    def generate(self, prompt: Any, params: DecodingParams | None = None, **changes: Any) -> Generation:
        return self._last(list(self._run("generate", prompt, params, changes)))

    def stream(self, prompt: Any, params: DecodingParams | None = None, **changes: Any) -> Generator[Chunk, None, None]:
        return self._run("stream", prompt, params, changes)

    def batch(
        self, prompts: Sequence[Any], params: DecodingParams | None = None, *, return_exceptions: bool = False
    ) -> list[Any]:
        self.batch_sizes.append(len(prompts))
        results: list[Any] = []
        for prompt in prompts:
            try:
                results.append(self._last(list(self._run("batch", prompt, params, {}))))
            except DetoxGuardError as error:
                if not return_exceptions:
                    raise
                results.append(error)
        return results

    async def agenerate(self, prompt: Any, params: DecodingParams | None = None, **changes: Any) -> Generation:
        return self._last([chunk async for chunk in self._arun("agenerate", prompt, params, changes)])

    async def astream(
        self, prompt: Any, params: DecodingParams | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._arun("astream", prompt, params, changes):
            yield chunk

    def count_tokens(self, prompt: Any) -> int:
        return len(self.encode(str(prompt)))

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    # -- inside

    @staticmethod
    def _last(chunks: list[Chunk]) -> Generation:
        generation = chunks[-1].generation
        assert generation is not None
        return generation

    def _plan(self, how: str, prompt: Any, params: DecodingParams | None, changes: dict[str, Any]) -> list[Chunk]:
        params = (params or self.params).replace(**changes)
        guard = params.guard or self.params.guard
        params = params.replace(guard=guard)
        self.calls.append((how, prompt, params))
        read = self.count_tokens(prompt)
        if read > WINDOW:
            raise PromptTooLongError("prompt", read, f"at most {WINDOW} tokens")
        text, reason = self.script(prompt, params), "stop"
        for stop in params.stop:
            text = text.split(stop)[0]
        pieces = re.findall(r"\S+\s*|\s+", text) if "<tool_call>" not in text else re.findall(r"(?s).{1,7}", text)
        if len(pieces) > params.max_new_tokens:
            pieces, reason = pieces[: params.max_new_tokens], "length"
        steering = Steering(params.alpha, params.rule, self.detoxifier_ids, 0.5, 0.25, 0, 0)
        whole = Generation(
            "".join(pieces),
            reason,
            Usage(read, len(pieces)),
            params.seed or 0,
            None,
            steering,  # type: ignore[arg-type]
            guard=guard and getattr(guard.scorer, "name", guard.scorer),
        )
        return [*(Chunk(piece) for piece in pieces), Chunk("", whole)]

    def _enter(self) -> None:
        with self._lock:
            self.active += 1
            self.most_active = max(self.most_active, self.active)

    def _leave(self, finished: bool) -> None:
        with self._lock:
            self.active -= 1
            self.abandoned += not finished

    def _run(
        self, how: str, prompt: Any, params: DecodingParams | None, changes: dict[str, Any]
    ) -> Generator[Chunk, None, None]:
        finished = False
        self._enter()
        try:
            for chunk in self._plan(how, prompt, params, changes):
                time.sleep(self.step_s)
                self._fail(prompt, chunk)
                yield chunk
            finished = True
        finally:
            self._leave(finished)

    async def _arun(
        self, how: str, prompt: Any, params: DecodingParams | None, changes: dict[str, Any]
    ) -> AsyncGenerator[Chunk, None]:
        finished = False
        self._enter()
        try:
            for chunk in self._plan(how, prompt, params, changes):
                await asyncio.sleep(self.step_s)
                self._fail(prompt, chunk)
                yield chunk
            finished = True
        finally:
            self._leave(finished)

    @staticmethod
    def _fail(prompt: Any, chunk: Chunk) -> None:
        """A prompt that says "break" fails after its second word."""
        if chunk.text.startswith("reader") and "break" in str(prompt):
            raise StepError("the forward pass failed", hint="none")


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as Hermes templates write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


class WordScorer:
    """Finds one mild word toxic, so that tests need no worse."""

    name = "word"

    def __init__(self, word: str = "rotten") -> None:
        self.word = word

    def score(self, texts: Sequence[str]) -> list[float]:
        return [0.9 if self.word in text else 0.1 for text in texts]
