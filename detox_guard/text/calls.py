"""Tool calls cut out of a reply, whole or as it streams. Knows where blocks begin and end; leaves what is in them to
`detox_guard.text.call_formats`. Knows no model and no tokenizer.

Reading takes time in proportion to the reply, and its parts do not depend on how the reply was cut into pieces.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detox_guard.text.call_formats import FORMS, Form, read_bare

__all__ = ["ToolCall", "ToolCallStream", "parse_tool_calls"]

_WINDOW = 300
"""Characters by which it must be clear whether a tag opens a call."""
_BARE = tuple(
    bracket + begins
    for bracket in ("", "[")
    for begins in (
        '{"name":',
        '{"type":"function"',
        '{"function":',
        '{"tool_name":',
        '{"arguments":',
        '{"parameters":',
        '{"id":',
    )
)
"""What a reply that is all calls, without tags, begins with; white space aside."""
_BARE_PYTHON = re.compile(r"\[\s*[A-Za-z_][\w.]*\s*\(")
_BARE_PYTHON_BEGUN = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*)?")
_NAME = re.compile(r"[A-Za-z_][\w.:-]*")
_BY_TAG = {form.open: form for form in FORMS}


def _any_of(tokens: Sequence[str]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))


_OPEN = re.compile(_any_of(tuple(_BY_TAG)))
# What a value in tags may hold: anything up to its own end.
_VALUES = {"<parameter=": ("</parameter>", "</function>"), "<arg_value>": ("</arg_value>",)}


@dataclass(frozen=True)
class ToolCall:
    """One call that a model wrote. `id` is drawn when it is read: nine letters and digits, which all templates take."""

    id: str
    name: str
    arguments: dict[str, Any]


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[ToolCall], list[str]]:
    """A whole reply as its content, its calls, and the raw text of calls that cannot be read. Never raises.

    `tools` as for `ToolCallStream`.
    """
    stream = ToolCallStream(tools)
    parts = [*stream.push(text), *stream.flush()]
    content = "".join(part for part in parts if isinstance(part, str))
    return content, [part for part in parts if isinstance(part, ToolCall)], stream.invalid


class ToolCallStream:
    """Reads a reply as it comes. However it is cut into pieces, the parts are those of `parse_tool_calls`.

    Text inside a call is never content, nor is white space that only sets calls apart; a tag that no call follows is
    text like any other. Content on the two sides of a call is never joined without white space. A reply that might be
    nothing but calls (it begins like one) is held back until that is certain. `tools`, OpenAI-style, tell the types of
    arguments that a model writes without quotes (Qwen3-Coder, GLM); without them such a one is text, or JSON if it is
    an object or a list. With them, a reply without tags is a call only if it names one of them.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.invalid: list[str] = []
        """Raw text of calls that cannot be read."""
        self._types = _types_of(tools)
        self._names = frozenset(name for name, _ in _functions_of(tools))
        self._parts: list[str | ToolCall] = []
        # The reply so far, while it may be nothing but calls; None once that is settled.
        self._start: list[str] | None = []
        self._bare = False
        self._held = ""  # may yet be a tag, or a tag of which it is not clear what follows
        self._form: Form | None = None  # of the block that is open
        self._body: list[str] = []
        self._scan: re.Pattern[str] | None = None
        self._tokens: tuple[str, ...] = ()
        self._quoted = False
        self._value: tuple[str, ...] = ()  # what ends the value in tags that is open
        self._white: list[str] = []  # at the end of the content so far
        self._tail = ""  # the last characters outside of calls
        self._blank = True  # nothing but white space, or a call, on this line so far
        self._said = self._called = self._break = False

    def push(self, delta: str) -> list[str | ToolCall]:
        """What this piece of the reply completes: text that is safe to show, and whole calls."""
        self._parts = []
        if self._start is None:
            self._feed(delta)
            return self._parts
        if not self._start:
            text = delta.lstrip()
            self._say(delta[: len(delta) - len(text)])
            delta = text
        if delta:
            self._start.append(delta)
            if not self._bare:
                begun = "".join(self._start)
                verdict = _begins_bare(begun)
                self._bare = bool(verdict)
                if verdict is False:
                    self._start = None
                    self._feed(begun)
        return self._parts

    def flush(self) -> list[str | ToolCall]:
        """The reply is over: what is left of it."""
        self._parts = []
        if self._start is not None:
            text, self._start = "".join(self._start), None
            calls = read_bare(text, self._types) if self._bare else []
            if calls and (not self._names or self._names.issuperset(name for name, _ in calls)):
                self._take(calls)
                return self._parts
            self._feed(text)
        held, self._held = self._held, ""
        if self._form:  # the model stopped without the closing tag
            self._body.append(held)
            self._close("")
        elif held and (tag := _OPEN.match(held)) and self._blank and not self._in_code:
            self._called = True
            self.invalid.append(held)
            assert tag
        else:
            self._say(held)
        if self._white and not self._called:
            self._parts.append("".join(self._white))
        return self._parts

    # -- outside of calls

    def _feed(self, text: str) -> None:
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text):
            at = self._inside(text, at, self._form) if self._form else self._outside(text, at)

    def _outside(self, text: str, at: int) -> int:
        """Go on from `at`; gives where."""
        tag = _OPEN.search(text, at)
        if not tag:
            safe = len(text) - _begun(text[at:], _BY_TAG)
            self._say(text[at:safe])
            self._held = text[safe:]
            return len(text)
        self._say(text[at : tag.start()])
        form = _BY_TAG[tag[0]]
        window = text[tag.end() : tag.end() + _WINDOW]
        opens = False if self._in_code else _opens(form, window, blank=self._blank)
        if opens is None and len(window) < _WINDOW:
            self._held = text[tag.start() :]
            return len(text)
        if opens:
            self._open(form, window)
        else:
            self._say(tag[0])
        return tag.end()

    def _say(self, text: str) -> None:
        """Content; white space at its end waits for what follows."""
        if not text:
            return
        self._tail = (self._tail + text[-3:])[-3:]
        line = text.rfind("\n") + 1
        self._blank = (bool(line) or self._blank) and not text[line:].strip()
        words = text.rstrip()
        if words:
            words = "".join(self._white) + words
            self._parts.append("\n" + words if self._break and not words[0].isspace() else words)
            rest = text[len(text.rstrip()) :]
            self._white = [rest] if rest else []
            self._said, self._break = True, False
        else:
            self._white.append(text)

    @property
    def _in_code(self) -> bool:
        """Right behind the backtick of code within a line."""
        return self._tail.endswith("`") and not self._tail.endswith("```")

    # -- inside

    def _open(self, form: Form, window: str) -> None:
        self._form, self._body = form, []
        self._quoted, self._value = False, ()
        ends = tuple(filter(None, (form.close,)))
        if form.open == "<tool_call>":
            in_tags = window.lstrip()[:1] not in ("{", "[")
            marks = (*_VALUES, *(end for ends_ in _VALUES.values() for end in ends_)) if in_tags else ('"',)
            ends = (*ends, form.open, *marks)
        self._tokens = ends
        escapes = r"\\.|" if '"' in ends else ""
        self._scan = re.compile(escapes + _any_of(ends), re.DOTALL) if ends else None

    def _inside(self, text: str, at: int, form: Form) -> int:
        """Go on from `at`; gives where. A closing tag inside a JSON string or a value in tags is none."""
        scanned = at
        for token in self._scan.finditer(text, at) if self._scan else ():
            scanned, what = token.end(), token[0]
            if what == '"':
                self._quoted = not self._quoted
            elif what in self._value:
                self._value = ()
            elif what in _VALUES:
                self._value = self._value or _VALUES[what]
            elif what in (form.open, form.close) and not self._quoted and not self._value:
                self._body.append(text[at : token.start()])
                closed = what == form.close
                self._close(what if closed else "")
                return token.end() if closed else token.start()
        begun = _begun(text[scanned:], self._tokens) or (
            1 if text.endswith("\\", scanned) and '"' in self._tokens else 0
        )
        self._body.append(text[at : len(text) - begun])
        self._held = text[len(text) - begun :]
        return len(text)

    def _close(self, tag: str) -> None:
        assert self._form
        form, block = self._form, "".join(self._body)
        self._form, self._body = None, []
        calls = form.read(block, self._types)
        if not calls:
            self.invalid.append(form.open + block + tag)
        self._take(calls)

    def _take(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self._parts += [ToolCall(secrets.token_hex(5)[:9], name, arguments) for name, arguments in calls]
        self._white.clear()
        self._tail, self._blank, self._called, self._break = "", True, True, self._said


def _functions_of(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each tool's name and function, OpenAI-style or bare."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping):
            yield str(function.get("name")), function


def _types_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    types: dict[str, Mapping[str, Any]] = {}
    for name, function in _functions_of(tools):
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping):
            types[name] = properties
    return types


def _begins_bare(text: str) -> bool | None:
    """Whether a reply begins like one that is all calls; None where that is not clear yet."""
    window = text[:_WINDOW]
    compact = "".join(window.split())
    if any(compact.startswith(mark) for mark in _BARE) or _BARE_PYTHON.match(window):
        return True
    open_ = any(mark.startswith(compact) for mark in _BARE) or _BARE_PYTHON_BEGUN.fullmatch(window)
    return None if open_ and len(text) < _WINDOW else False


def _opens(form: Form, window: str, *, blank: bool) -> bool | None:
    """Whether what follows a tag makes it a call's; None where that is not clear yet. Tags with nothing or only a name
    between them do so on a line of their own."""
    text = window.lstrip()
    compact = "".join(text.split())
    name = _NAME.match(text)
    rest = "".join(text[name.end() :].split()) if name else ""
    unclear = not text
    for begins in form.begins:
        if begins.endswith(form.close) and form.close and not blank:
            continue
        wanted, found = (begins[4:], rest) if begins.startswith("name") else (begins, compact)
        if begins.startswith("name") and not (name and (wanted[0] == "<" or not text[name.end() :][:1].isspace())):
            continue  # only a tag may stand apart from the name
        if found.startswith(wanted):
            return True
        unclear = unclear or wanted.startswith(found)
    return None if unclear else False


def _begun(text: str, tokens: Sequence[str] | Mapping[str, Any]) -> int:
    """Length of the longest end of `text` that begins one of the tokens."""
    if "<" not in text[-_WINDOW:] and "[" not in text[-_WINDOW:]:  # all of them begin so
        return 0
    longest = max(map(len, tokens), default=1) - 1
    tail = text[-longest:] if longest else ""
    return next((n for n in range(len(tail), 0, -1) if any(t.startswith(tail[-n:]) for t in tokens)), 0)
