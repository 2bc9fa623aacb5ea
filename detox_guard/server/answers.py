"""From replies to OpenAI's answers, whole and as a stream. Knows both forms; waits for nothing."""

from __future__ import annotations

import json
import math
import secrets
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import detox_guard
from detox_guard.server.errors import json_text
from detox_guard.text.tools import ToolCall, ToolCallStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from detox_guard.results import Chunk, Generation, TokenTrace
    from detox_guard.server.asking import Asked

__all__ = ["Answer", "event"]

_REASONS = {"guard": "content_filter"}
_LEAST = -9999.0
"""The logarithm of nothing, as OpenAI writes it."""


class Answer:
    """The answer to one request, built of its chunks. `kind` is a chat's or a completion's."""

    def __init__(self, kind: Literal["chat", "text"], model: str, asked: Asked) -> None:
        self._chat, self._asked = kind == "chat", asked
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"detox-guard-{detox_guard.__version__}",
        }
        self._choices = [_Choice(i, asked, chat=self._chat) for i in range(len(asked.prompts))]

    @property
    def id(self) -> str:
        """The answer's own name."""
        return str(self._head["id"])

    @property
    def replies(self) -> list[Generation]:
        """Those that are whole."""
        return [choice.reply for choice in self._choices if choice.reply is not None]

    def opening(self) -> Iterator[str]:
        """Events before the first word."""
        if self._chat:
            for choice in self._choices:
                yield self._event([choice.delta({"role": "assistant", "content": ""})])

    def push(self, place: int, chunk: Chunk) -> Iterator[str]:
        """Events of one chunk."""
        told = list(self._choices[place].push(chunk))
        for one in told:
            yield self._event([one])

    def closing(self) -> Iterator[str]:
        """Events behind the last chunk."""
        if self._asked.usage:
            yield self._event([], usage=self.usage())
        yield "data: [DONE]\n\n"

    def keep(self, place: int, chunk: Chunk) -> None:
        """Take in a chunk of an answer that is not streamed."""
        self._choices[place].keep(chunk)

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [choice.whole() for choice in self._choices]
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of all choices; a prompt of several choices counts once."""
        read = sum(reply.usage.prompt_tokens for reply in self.replies[:: self._asked.each])
        written = sum(reply.usage.completion_tokens for reply in self.replies)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        usage = {"usage": None} if self._asked.usage else {}
        return event({**self._head, "object": kind, "choices": choices, **usage, **more})


class _Choice:
    """One reply of an answer."""

    def __init__(self, index: int, asked: Asked, *, chat: bool) -> None:
        self._index, self._asked, self._chat = index, asked, chat
        self._calls = ToolCallStream(asked.tools) if asked.tools else None
        self._content: list[str] = []
        self._called: list[dict[str, Any]] = []
        self._tokens: list[TokenTrace] = []
        """Not told yet."""
        self._offset = 0
        self.reply: Generation | None = None

    def push(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """The choice of each event."""
        for part in self._parts(chunk):
            if isinstance(part, str):
                told = self.delta({"content": part}) if self._chat else self._text(part)
            else:
                told = self.delta({"tool_calls": [{"index": len(self._called) - 1, **part}]})
            yield told | self._figures()
        if self.reply is not None:
            yield {**(self.delta({}) if self._chat else self._text("")), **self._end(self.reply)}

    def keep(self, chunk: Chunk) -> None:
        for _ in self._parts(chunk):
            pass

    def delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self) -> dict[str, Any]:
        assert self.reply is not None, "asked before the reply was whole"
        text = "".join(self._content)
        if not self._chat:
            return {**self._text(text), **self._end(self.reply)}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._called:
            message |= {"content": text or None, "tool_calls": self._called}
        return {"index": self._index, "message": message, **self._end(self.reply)}

    def _text(self, text: str) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": None, "finish_reason": None}

    def _parts(self, chunk: Chunk) -> Iterator[str | dict[str, Any]]:
        """Text, and calls of tools, of a chunk; both are kept."""
        self.reply = chunk.generation
        self._tokens += chunk.tokens
        said: Iterable[str | ToolCall] = [chunk.text]
        if self._calls is not None:
            said = self._calls.push(chunk.text)
            if self.reply is not None:
                said = [*said, *self._calls.flush()]
        for part in said:
            if isinstance(part, str):
                if part:
                    self._content.append(part)
                    yield part
            elif self._asked.parallel or not self._called:
                function = {"name": part.name, "arguments": json.dumps(part.arguments, ensure_ascii=False)}
                self._called.append({"id": f"call_{part.id}", "type": "function", "function": function})
                yield self._called[-1]

    def _end(self, reply: Generation) -> dict[str, Any]:
        reason = _REASONS.get(reply.finish_reason, reply.finish_reason)
        if self._called and reason == "stop":
            reason = "tool_calls"
        detox = reply.summary()
        if self._calls is not None and self._calls.invalid:
            detox["unreadable_calls"] = len(self._calls.invalid)
        figures = self._figures(last=True)
        return {"finish_reason": reason, **figures, "detox": detox | figures.get("detox", {})}

    def _figures(self, *, last: bool = False) -> dict[str, Any]:
        """Log probabilities and trace of the tokens that were not told yet."""
        tokens, self._tokens = self._tokens, []
        told: dict[str, Any] = {"logprobs": None}
        if self._asked.logprobs and (tokens or last):
            told["logprobs"] = self._chat_logprobs(tokens) if self._chat else self._text_logprobs(tokens)
        if self._asked.trace and (tokens or (last and self.reply is not None and self.reply.trace is not None)):
            told["detox"] = {"trace": [_figures_of(token, self._asked.others) for token in tokens]}
        return told

    def _chat_logprobs(self, tokens: Sequence[TokenTrace]) -> dict[str, Any]:
        told = [
            {**_told(token.text, token.p_after), "top_logprobs": [_told(one.text, one.p) for one in token.top]}
            for token in tokens
        ]
        return {"content": told, "refusal": None}

    def _text_logprobs(self, tokens: Sequence[TokenTrace]) -> dict[str, Any]:
        """The token that was drawn is always among the others, as OpenAI has it."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        tops = [
            {**{one.text: _log(one.p) for one in reversed(token.top)}, token.text: _log(token.p_after)}
            for token in tokens
        ]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_log(token.p_after) for token in tokens],
            "top_logprobs": tops if self._asked.prompts[self._index][1].trace_top else None,
            "text_offset": offsets,
        }


_LINE_ENDS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"}


def event(told: dict[str, Any]) -> str:
    """One server-sent event. Unicode's own line ends are escaped: some clients take them for the end of a line."""
    return f"data: {json_text(told).translate(_LINE_ENDS)}\n\n"


def _log(probability: float) -> float:
    return max(_LEAST, math.log(probability)) if probability > 0 else _LEAST


def _told(text: str, probability: float) -> dict[str, Any]:
    """A token by itself; half a character has bytes that its text does not tell."""
    return {
        "token": text,
        "logprob": _log(probability),
        "bytes": None if "\ufffd" in text else list(text.encode("utf-8", "replace")),
    }


def _figures_of(token: TokenTrace, others: bool) -> dict[str, Any]:
    figures = {**asdict(token), "strength": token.strength}
    del figures["top"]  # what `top_logprobs` is for
    if not others:
        del figures["preferred"], figures["preferred_id"]
    return {name: _finite(value) for name, value in figures.items()}


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
