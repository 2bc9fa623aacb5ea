"""From prompts to ids and from ids back to text, a token at a time. Knows a tokenizer; knows no engine, no steering."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from detox_guard.errors import PromptError
from detox_guard.text.call_formats import KEPT_TOKENS
from detox_guard.text.messages import checked_text, read_messages, strings_in
from detox_guard.text.template import encode_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from detox_guard.models.backbone import Backbone

__all__ = [
    "ChatPrompt",
    "Message",
    "Prompt",
    "StopMatcher",
    "TextStream",
    "encode_prompt",
    "prompt_texts",
    "strings_in",
    "with_system_text",
    "with_template_kwargs",
]

Message = Mapping[str, Any]
"""One chat message: at least `role` and `content`. See `ChatPrompt` for those of tools."""


@dataclass(frozen=True)
class ChatPrompt:
    """Chat messages, with the tools that the model may call. Taken wherever a prompt is.

    Messages are OpenAI-style: `role` and `content` (text, or a list of parts of text). `tools` are
    `{"type": "function", "function": {"name", "description", "parameters"}}`. An assistant's message may carry
    `tool_calls` (`[{"id", "type": "function", "function": {"name", "arguments": dict or JSON text}}]`), its content may
    then be None; a result has role "tool", and `tool_call_id` and `name`. Ids may have any form or be missing. The chat
    template renders all that if it knows tools (`DetoxiGen.supports_tools`); else plain messages say it
    (`text.tools`). A template that refuses roles, ids or the order of turns, or would leave a message out, gets
    the same history in a form that it takes (`text.messages.layouts`). Control tokens that are spelt out in a
    message, a tool or a variable are read as plain text.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `{"enable_thinking": False}`."""


Prompt = str | Sequence[Message] | ChatPrompt

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 6
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""


def with_template_kwargs(prompt: Prompt, kwargs: Mapping[str, Any] | None) -> Prompt:
    """The prompt with these variables of the chat template, beside its own and before them.

    Raises `PromptError` for a plain string, which goes through no template.
    """
    if not kwargs:
        return prompt
    if not isinstance(kwargs, Mapping):
        raise PromptError("chat_template_kwargs", kwargs, "a mapping of names to values")
    if isinstance(prompt, str):
        raise PromptError(
            "chat_template_kwargs", dict(kwargs), "for chat messages only: a plain string goes through no template"
        )
    if not isinstance(prompt, ChatPrompt):
        return ChatPrompt(prompt, chat_template_kwargs=kwargs)
    return replace(prompt, chat_template_kwargs={**prompt.chat_template_kwargs, **kwargs})


def with_system_text(prompt: Prompt, text: str) -> Prompt:
    """The prompt with `text` as a system message, or added to the one that it has; before a plain prompt, as text.

    Raises `PromptError` as `encode_prompt`.
    """
    if isinstance(prompt, str):
        return f"{text}\n\n{checked_text('prompt', prompt)}"
    chat = prompt if isinstance(prompt, ChatPrompt) else ChatPrompt(prompt)
    first, *rest = messages = read_messages(chat.messages)
    if first["role"] == "system":
        messages = [{**first, "content": f"{first['content']}\n\n{text}".strip()}, *rest]
    else:
        messages = [{"role": "system", "content": text}, *messages]
    return replace(chat, messages=messages)


def encode_prompt(backbone: Backbone, prompt: Prompt) -> list[int]:
    """Token ids of a plain prompt, or of chat messages through the template.

    A plain prompt may itself be laid out as a template does it; the tokens that the tokenizer puts in front of a text
    are not put there twice. Raises `PromptError` that names what is wrong: empty, not text, lone surrogates, no chat
    template, bad messages.
    """
    if isinstance(prompt, str):
        checked_text("prompt", prompt)
        ids = _encode_text(backbone.tokenizer, prompt)
    elif isinstance(prompt, ChatPrompt):
        ids = encode_messages(backbone, prompt.messages, prompt.tools or (), prompt.chat_template_kwargs or {})
    elif isinstance(prompt, list | tuple):
        ids = encode_messages(backbone, prompt, (), {})
    else:
        raise PromptError("prompt", prompt, "a string or a list of chat messages")
    if not ids:
        raise PromptError("prompt", prompt, "at least one token")
    return list(ids)


def prompt_texts(prompt: Prompt) -> list[str]:
    """What a reader of the prompt reads: the string itself, or each message's content (tool results too), the words in
    the calls it made, and documents that are handed to the template. Raises `PromptError` as `encode_prompt`."""
    if isinstance(prompt, str):
        return [prompt]
    chat = prompt if isinstance(prompt, ChatPrompt) else ChatPrompt(prompt)
    texts = []
    for message in read_messages(chat.messages):
        texts.append(str(message["content"]))
        for call in message.get("tool_calls", ()):
            texts += strings_in(call["function"]["arguments"])
    return texts + strings_in((chat.chat_template_kwargs or {}).get("documents"))


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    if not text.startswith(tuple(tokenizer.all_special_tokens) or ("\0",)):
        return ids
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    for added in range(1, len(ids) - len(bare) + 1):
        if ids[added : added + len(bare)] == bare and bare[:added] == ids[:added]:
            return ids[added:]
    return ids


class TextStream:
    """Incremental detokenizing: `push(id)` returns the text that this token completes, which may be "".

    A character whose bytes are split over tokens comes with its last token; U+FFFD is a character like any other.
    Decoding keeps a few tokens of context (at first the prompt's end), because some tokenizers drop a leading space.
    Special tokens are no text, but for those without which a tool call could not be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = _vocabulary(tokenizer)
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._context = 0
        self._read = len(self._ids)
        self._before: list[tuple[int, int]] = []  # (context, read) before each push, for `rewind`

    def push(self, token_id: int) -> str:
        self._before.append((self._context, self._read))
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        if len(now) < len(before) or (now.endswith(_REPLACEMENT) and self._ends_in_half_a_character()):
            return ""
        self._context, self._read = max(0, self._read - _CONTEXT_TOKENS), len(self._ids)
        return now[len(before) :]

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` pushes, at least one."""
        self._context, self._read = self._before[-tokens]
        del self._before[-tokens:], self._ids[-tokens:]

    @property
    def whole(self) -> bool:
        """No half character is held back."""
        return self._read == len(self._ids)

    def _decode(self, ids: Sequence[int]) -> str:
        dropped = self._vocabulary.only_dropped
        if dropped is None:
            text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        else:
            shown = [token for token in ids if token not in dropped]
            text = self._tokenizer.decode(shown, clean_up_tokenization_spaces=False)
        return str(text)

    def _ends_in_half_a_character(self) -> bool:
        """Whether the bytes so far could go on as a character. Where nobody can say what they are: that they do."""
        tail = b""
        for token in reversed(self._ids):
            written = self._vocabulary.bytes_of(token)
            if written is None:
                return True
            tail = written + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        return bool(decoder.getstate()[0])


class _Vocabulary:
    """What one tokenizer's tokens are, as far as its decoding does not tell."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token_id: token.content for token_id, token in added.items()}
        special = {token_id for token_id, token in added.items() if token.special}
        dropped = frozenset(token_id for token_id in special if self._added[token_id] not in KEPT_TOKENS)
        self._dropped = dropped
        self.only_dropped = None if len(dropped) == len(special) else dropped
        """The special tokens that are no text; None where that is all of them."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decoder = None if backend is None else repr(backend.decoder)

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for; None where the tokenizer does not say."""
        if token_id in self._dropped:
            return b""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str) or self._decoder is None:
            return None
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes([int(byte[1], 16)])
        table = _byte_alphabet() if "ByteLevel" in self._decoder else {}
        return bytes(table[sign] for sign in token) if all(sign in table for sign in token) else token.encode()


_vocabularies: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, _Vocabulary]] = WeakKeyDictionary()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    known = _vocabularies.get(tokenizer)
    if known is None or known[0] != len(tokenizer):  # tokens were added since
        known = _vocabularies[tokenizer] = (len(tokenizer), _Vocabulary(tokenizer))
    return known[1]


@cache
def _byte_alphabet() -> dict[str, int]:
    """Which byte each sign of a byte-level vocabulary is."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {sign: byte for byte, sign in bytes_to_unicode().items()}


class StopMatcher:
    """Cuts text before the first stop string, and holds back what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    @property
    def held(self) -> str:
        """What was pushed but not emitted yet."""
        return self._held

    def rewind(self, held: str) -> None:
        """Back to where `held` was held back."""
        self._held, self.stopped = held, False

    def push(self, text: str) -> str:
        """Text that is safe to emit now. Sets `stopped` when a stop string was met; nothing comes after."""
        if self.stopped:
            return ""
        self._held += text
        hits = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            self.stopped = True
            out, self._held = self._held[: min(hits)], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """The reply is over: what was held back is text after all."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
