"""From prompts to ids and from ids back to text, a token at a time. Knows a tokenizer; knows no engine, no steering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from detox_guard.errors import PromptError
from detox_guard.tools import function_of, knows_tools, with_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from detox_guard.backbone import Backbone

__all__ = ["Message", "Prompt", "StopMatcher", "TextStream", "encode_prompt", "prompt_texts", "strings_in"]

Message = Mapping[str, Any]
"""One chat message: at least `role` and `content`, both str. See `ChatPrompt` for those of tools."""


@dataclass(frozen=True)
class ChatPrompt:
    """Chat messages, with the tools that the model may call. Taken wherever a prompt is.

    `tools` are OpenAI-style: `{"type": "function", "function": {"name", "description", "parameters"}}`. An assistant's
    message may carry `tool_calls` (`[{"id", "type": "function", "function": {"name", "arguments": dict}}]`), a result
    has role "tool", and `tool_call_id` and `name`. The chat template renders all that if it knows tools
    (`DetoxiGen.supports_tools`); else plain messages say it (`detox_guard.tools`). Where it refuses the role "system",
    the first message of the user begins with what the system says.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `{"enable_thinking": False}`."""


Prompt = str | Sequence[Message] | ChatPrompt

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


_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 6


def encode_prompt(backbone: Backbone, prompt: Prompt) -> list[int]:
    """Token ids of a plain prompt, or of chat messages through the template (straight to ids, never tokenized twice).

    Raises `PromptError` that names what is wrong: empty, not text, lone surrogates, no chat template, bad messages.
    """
    if isinstance(prompt, str):
        _check_text("prompt", prompt)
        ids = backbone.tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, ChatPrompt):
        ids = _encode_messages(backbone, prompt.messages, prompt.tools or (), prompt.chat_template_kwargs or {})
    elif isinstance(prompt, list | tuple):
        ids = _encode_messages(backbone, prompt, (), {})
    else:
        raise PromptError("prompt", prompt, "a string or a list of chat messages")
    if not ids:
        raise PromptError("prompt", prompt, "at least one token")
    return list(ids)


def prompt_texts(prompt: Prompt) -> list[str]:
    """What a reader of the prompt reads: the string itself, or each message's content (tool results too) and the words
    in the calls it made."""
    if isinstance(prompt, str):
        return [prompt]
    messages = prompt.messages if isinstance(prompt, ChatPrompt) else prompt
    texts = []
    for message in messages:
        texts.append(str(message["content"]))
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, Mapping) else None
            texts += strings_in(function.get("arguments")) if isinstance(function, Mapping) else []
    return texts


def strings_in(value: object) -> list[str]:
    """All strings among the values of nested mappings and lists, as in the arguments of a tool call."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for part in value for text in strings_in(part)]
    return [value] if isinstance(value, str) else []


def template_of(backbone: Backbone) -> str | None:
    """The chat template, where there are several the one for tools; None without any.

    Raises `PromptError` where none of several is the default.
    """
    if not backbone.has_chat_template:
        return None
    try:
        template: str = backbone.tokenizer.get_chat_template(tools=[])
    except ValueError as error:
        raise PromptError("messages", backbone.id, f"one chat template: {error}") from error
    return template


def _encode_messages(
    backbone: Backbone,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    kwargs: Mapping[str, Any],
) -> list[int]:
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError("messages", messages, "at least one message")
    for i, tool in enumerate(tools):
        function_of(tool, f"tools[{i}]")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"messages[{i}]", message, "a mapping with role and content")
        for key in ("role", "content"):
            _check_text(f"messages[{i}].{key}", message.get(key), may_be_empty=key == "content")
    if not backbone.has_chat_template:
        raise PromptError(
            "messages", f"{len(messages)} messages", f"{backbone.id} has no chat template", hint="pass a plain string"
        )
    from jinja2 import TemplateError

    native = knows_tools(template_of(backbone))

    def rendered(said: list[dict[str, Any]]) -> list[int]:
        encoded: Any = backbone.tokenizer.apply_chat_template(
            said,
            tools=list(tools) if native and tools else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **kwargs,
        )
        ids: list[int] = encoded["input_ids"]
        return ids

    said: list[dict[str, Any]] = []
    refused = (TemplateError, TypeError, ValueError, KeyError)
    try:
        said = [dict(message) for message in messages] if native else with_tools(messages, tools)
        return rendered(said)
    except PromptError:
        raise
    except refused as error:
        if [message["role"] for message in said[:2]] == ["system", "user"]:
            told = f"{said[0]['content']}\n\n{said[1]['content']}"
            with suppress(*refused):
                return rendered([{**said[1], "content": told}, *said[2:]])
        raise PromptError(
            "messages", [message.get("role") for message in messages], f"the chat template refuses them: {error}"
        ) from error


def _check_text(field: str, value: object, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise PromptError(field, value, "a string")
    if not value and not may_be_empty:
        raise PromptError(field, value, "at least one character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(field, value[error.start : error.end], "valid Unicode, without lone surrogates") from None


class TextStream:
    """Incremental detokenizing: `push(id)` returns the text that this token completes, which may be "".

    A character whose bytes are split over tokens comes with its last token. Decoding keeps a few tokens of context
    (at first the prompt's end), because some tokenizers drop a leading space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._context = 0
        self._read = len(self._ids)
        self._before: list[tuple[int, int]] = []  # (context, read) before each push, for `rewind`

    def push(self, token_id: int) -> str:
        self._before.append((self._context, self._read))
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        if now.endswith(_REPLACEMENT) or len(now) < len(before):
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
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


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
