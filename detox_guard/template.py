"""Chat messages through a backbone's chat template, straight to ids. Knows Jinja templates and control tokens of any
Hugging Face tokenizer; leaves reading histories and the ways to lay them out to `detox_guard.messages`.

Two promises: what a message, a tool or a variable says is never read as a control token, and nothing that a history
says is left out without an error.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from detox_guard.errors import PromptError
from detox_guard.messages import Layout, layouts, read_messages, strings_in
from detox_guard.plain import as_plain, json_fault
from detox_guard.tools import function_of, knows_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from detox_guard.backbone import Backbone

__all__ = ["encode_messages", "template_of"]

_MARKED = re.compile(r"<[|｜].*[|｜]>")
"""What a control token mostly looks like. Phi-4's template makes some from pieces, so that it does not show them."""


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


def encode_messages(
    backbone: Backbone, messages: object, tools: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any]
) -> list[int]:
    """Ids of the messages, and of the header of the reply, as the template lays them out.

    `kwargs` are variables of the template. Raises `PromptError`, and `InvalidParamsError` for `tools`.
    """
    said = read_messages(messages)
    for i, tool in enumerate(tools):
        function_of(tool, f"tools[{i}]")
    variables = _variables(backbone.tokenizer, kwargs)
    if not backbone.has_chat_template:
        raise PromptError(
            "messages", f"{len(said)} messages", f"{backbone.id} has no chat template", hint="pass a plain string"
        )
    template = template_of(backbone) or ""
    rendering = _Rendering(backbone.tokenizer, template, variables)
    refusal: PromptError | None = None
    for layout in layouts(said, tools, native=knows_tools(template)):
        try:
            text = rendering.text(layout)
            if lost := rendering.lost(layout):
                raise PromptError(lost, _at(layout, lost), "the chat template leaves it out")
            return rendering.ids(layout, text)
        except PromptError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _variables(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(kwargs, Mapping):
        raise PromptError("chat_template_kwargs", kwargs, "a mapping of names to values")
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents", "kwargs"} | {"messages"}
    for name in kwargs:
        if not isinstance(name, str) or name in own:
            raise PromptError("chat_template_kwargs", name, "the name of a variable of the chat template")
        if fault := json_fault(kwargs[name]):
            raise PromptError(f"chat_template_kwargs.{name}", kwargs[name], fault)
    plain: dict[str, Any] = as_plain(kwargs)
    return plain


def _at(layout: Layout, field: str) -> object:
    kind, _, index = field.rstrip("]").partition("[")
    return (layout.tools if kind == "tools" else layout.messages)[int(index)]


class _Rendering:
    """One tokenizer's template with its variables."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, variables: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._variables = variables

    def text(self, layout: Layout, variables: dict[str, Any] | None = None) -> str:
        """Raises `PromptError` where the template refuses the layout."""
        return str(self._apply(self._tokenizer, layout, variables, tokenize=False))

    def ids(self, layout: Layout, text: str) -> list[int]:
        """Ids of the layout, whose text this is. Control tokens that it spells out stay text."""
        control = _control_tokens(self._tokenizer, self._template)
        spelt = control.spelt
        inputs = (layout.messages, layout.tools, self._variables)
        if not spelt or not any(spelt.search(self._seen(one)) for one in _all_strings(inputs)):
            return self._encode(text)
        if "sanitize_control_tokens" not in inspect.signature(self._tokenizer.apply_chat_template).parameters:
            raise PromptError(
                "messages", "a control token as text", "only with a newer transformers", hint="upgrade transformers"
            )
        tokenizer = copy.copy(self._tokenizer)
        tokenizer.chat_control_tokens = list(control.ids)
        messages, tools, variables = (_changed(one, str, lambda key: spelt.sub(_opened, key)) for one in inputs)
        whole = self._apply(tokenizer, Layout(messages, tools), variables, sanitize_control_tokens=True)
        ids: list[int] = whole["input_ids"]

        def harmless(text: str) -> str:
            text = spelt.sub("x", text)
            seen = self._seen(text)
            return spelt.sub("x", seen) if spelt.search(seen) else text

        # A template may put such a token together again; then it is refused.
        messages, tools, variables = (_changed(one, harmless, harmless) for one in inputs)
        expected = self._encode(self.text(Layout(messages, tools), variables))
        if [one for one in ids if one in control.turns] != [one for one in expected if one in control.turns]:
            raise PromptError("messages", "a control token as text", "the chat template would make a real one of it")
        return ids

    def lost(self, layout: Layout) -> str | None:
        """The first message or tool that the template leaves out, as "messages[2]"; None if there is none.

        Found by a rendering of words that can be told apart, so that it does not matter what the template does to them.
        """
        words: dict[str, str] = {}

        def word(field: str) -> str:
            words[field] = f"{7_000_000 + 13 * len(words)}"
            return f"x{words[field]}"

        messages = []
        for i, message in enumerate(layout.messages):
            probe = dict(message)
            if message["content"].strip():
                probe["content"] = word(f"messages[{i}]")
            if "tool_calls" in message:
                probe["tool_calls"] = [
                    _probe_call(call, word(f"messages[{i}]" + " " * (k + 1)))
                    for k, call in enumerate(message["tool_calls"])
                ]
            messages.append(probe)
        tools = [
            {**tool, "function": {**tool["function"], "name": word(f"tools[{i}]")}}
            for i, tool in enumerate(layout.tools)
        ]
        try:
            text = self.text(Layout(messages, tools))
        except PromptError:  # it looks into what is said; then it does not ignore it
            return None
        return next((field.strip() for field, one in words.items() if one not in text), None)

    def _apply(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        variables: dict[str, Any] | None,
        **how: Any,
    ) -> Any:
        try:
            return tokenizer.apply_chat_template(
                layout.messages,
                tools=layout.tools or None,
                add_generation_prompt=True,
                **{"return_dict": True, **how} if how.get("tokenize", True) else how,
                **(self._variables if variables is None else variables),
            )
        except Exception as error:  # a template is anybody's program
            roles = [message["role"] for message in layout.messages]
            raise PromptError("messages", roles, f"the chat template refuses them: {error}") from error

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _seen(self, text: str) -> str:
        """The text, and what the tokenizer makes of it before it looks for tokens."""
        normalizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "normalizer", None)
        return text if normalizer is None else f"{text}\n{normalizer.normalize_str(text)}"


class _Control(NamedTuple):
    """Special tokens, and those added ones that the template writes or that look like it."""

    ids: dict[str, int]
    turns: frozenset[int]
    """All but tags such as `</think>`, which templates look for in what an assistant said."""
    spelt: re.Pattern[str] | None


_controls: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[str, int], _Control]] = WeakKeyDictionary()


def _control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> _Control:
    key = (template, len(tokenizer))
    known = _controls.get(tokenizer)
    if known is None or known[0] != key:
        ids, turns = {}, set()
        for token_id, token in tokenizer.added_tokens_decoder.items():
            text = token.content
            is_turn = token.special or _MARKED.fullmatch(text) is not None
            if is_turn or (text in template and not text.isspace() and not text.strip().isalnum()):
                ids[text] = token_id
                turns |= {token_id} if is_turn else set()
        longest_first = sorted(filter(None, ids), key=len, reverse=True)
        spelt = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE) if longest_first else None
        known = _controls[tokenizer] = (key, _Control(ids, frozenset(turns), spelt))
    return known[1]


def _probe_call(call: dict[str, Any], word: str) -> dict[str, Any]:
    return {**call, "function": {"name": word, "arguments": {word: word}}}


def _opened(found: re.Match[str]) -> str:
    """A control token in the name of an argument, broken so that it is none."""
    return f"{found[0][:1]} {found[0][1:]}"


def _all_strings(value: object) -> list[str]:
    """As `strings_in`, and all keys."""
    keys: list[str] = []

    def note(key: str) -> str:
        keys.append(key)
        return key

    _changed(value, str, note)
    return keys + strings_in(value)


def _changed(value: Any, text: Callable[[str], str], key: Callable[[str], str]) -> Any:
    """A copy of plain values with its texts and its keys changed."""
    if isinstance(value, Mapping):
        return {key(name): _changed(part, text, key) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(part, text, key) for part in value]
    return text(value) if isinstance(value, str) else value
