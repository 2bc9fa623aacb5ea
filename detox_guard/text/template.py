"""Chat messages through a backbone's chat template, straight to ids. Knows Jinja templates and control tokens of any
Hugging Face tokenizer; leaves reading histories and the ways to lay them out to `detox_guard.text.messages`.

Two promises: what a message, a tool or a variable says is never read as a control token, and nothing that a history
says is left out without an error.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from detox_guard._plain import as_plain, json_fault
from detox_guard.errors import InvalidParamsError, PromptError
from detox_guard.text.messages import Layout, layouts, read_messages, strings_in
from detox_guard.text.tools import function_of, knows_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from detox_guard.models.backbone import Backbone

__all__ = ["encode_messages", "template_of"]

_MARKED = re.compile(r"<[|｜].*[|｜]>")
"""What a control token mostly looks like. Phi-4's template makes some from pieces, so that it does not show them."""


_THOUGHT = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*", re.DOTALL)


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
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise InvalidParamsError("tools", tools, "a list of tools")
    for i, tool in enumerate(tools):
        function_of(tool, f"tools[{i}]")
    variables = _variables(backbone.tokenizer, kwargs)
    if not backbone.has_chat_template:
        raise PromptError(
            "messages", f"{len(said)} messages", f"{backbone.id} has no chat template", hint="pass a plain string"
        )
    template = template_of(backbone) or ""
    if "reasoning_content" in template:
        said = [_with_reasoning(message) for message in said]
    rendering = _Rendering(backbone.tokenizer, template, variables)
    refusal: PromptError | None = None
    for layout in layouts(said, tools, native=knows_tools(template)):
        try:
            text = rendering.text(layout)
            probe = rendering.probe(layout)
            if lost := probe.lost:
                raise PromptError(lost, _at(layout, lost), "the chat template leaves it out")
            return rendering.ids(layout, text, probe.text)
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


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A reply as it was decoded, thoughts and all, for a template that wants those apart."""
    thought = _THOUGHT.match(message["content"]) if message["role"] == "assistant" else None
    if thought is None or "reasoning_content" in message:
        return message
    return {**message, "reasoning_content": thought[1], "content": message["content"][thought.end() :]}


def _at(layout: Layout, field: str) -> object:
    kind, _, index = field.rstrip("]").partition("[")
    return (layout.tools if kind == "tools" else layout.messages)[int(index)]


class _Probe(NamedTuple):
    text: str
    lost: str | None
    """The first message or tool that the template leaves out, as "messages[2]"."""


class _Rendering:
    """One tokenizer's template with its variables."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, variables: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._variables = variables
        self._control = _control_tokens(tokenizer, template)

    def text(self, layout: Layout, variables: dict[str, Any] | None = None) -> str:
        """Raises `PromptError` where the template refuses the layout."""
        return str(self._apply(self._tokenizer, layout, variables, tokenize=False))

    def ids(self, layout: Layout, text: str, probe: str) -> list[int]:
        """Ids of the layout, whose text and probe these are. Control tokens that it spells out stay text.

        Raises `PromptError` where the template would make a control token of what is said, by changing it.
        """
        spelt = self._control.spelt
        inputs = (layout.messages, layout.tools, self._variables)
        if spelt and any(spelt.search(self._seen(one)) for one in strings_in(inputs)):
            if "sanitize_control_tokens" not in inspect.signature(self._tokenizer.apply_chat_template).parameters:
                raise PromptError(
                    "messages", "a control token as text", "only with a newer transformers", hint="upgrade transformers"
                )
            tokenizer = copy.copy(self._tokenizer)
            tokenizer.chat_control_tokens = list(self._control.ids)
            messages, tools, variables = (_changed(one, str, lambda key: spelt.sub(_opened, key)) for one in inputs)
            whole = self._apply(tokenizer, Layout(messages, tools), variables, sanitize_control_tokens=True)
            ids: list[int] = whole["input_ids"]
        else:
            ids = self._encode(text)
        if self._turns(ids) - self._turns(self._encode(probe)):
            raise PromptError("messages", "a control token as text", "the chat template would make a real one of it")
        return ids

    def probe(self, layout: Layout) -> _Probe:
        """A rendering of other words, which can be told apart: it does not matter what the template does to them."""
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
        tools = []
        for i, tool in enumerate(layout.tools):
            tools.append({**tool, "function": {**tool["function"], "name": word(f"tools[{i}]")}})
        inputs = (messages, tools, self._variables)
        messages, tools, variables = (_changed(one, self._harmless, self._harmless) for one in inputs)
        try:
            text = self.text(Layout(messages, tools), variables)
        except PromptError:  # it looks into what is said; then it does not ignore it
            inputs = (layout.messages, layout.tools, self._variables)
            messages, tools, variables = (_changed(one, self._harmless, self._harmless) for one in inputs)
            return _Probe(self.text(Layout(messages, tools), variables), None)
        return _Probe(text, next((field.strip() for field, one in words.items() if one not in text), None))

    def _turns(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(one for one in ids if one in self._control.turns)

    def _harmless(self, text: str) -> str:
        """Without control tokens, also in what the tokenizer makes of the text before it looks for them."""
        spelt = self._control.spelt
        if spelt is None:
            return text
        seen = self._seen(text)
        return spelt.sub("x", seen if spelt.search(seen) else text)

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


def _changed(value: Any, text: Callable[[str], str], key: Callable[[str], str]) -> Any:
    """A copy of plain values with its texts and its keys changed."""
    if isinstance(value, Mapping):
        return {key(name): _changed(part, text, key) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(part, text, key) for part in value]
    return text(value) if isinstance(value, str) else value
