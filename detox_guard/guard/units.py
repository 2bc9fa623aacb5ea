"""What is read: the texts that are scored for a piece of a text, as its reader will see them. Knows units, JSON and
tool calls; knows no scorer, no policy.

A reader sees more than the characters that stream by: strings of JSON decoded (also JSON inside a string), content
without the tool calls in it, a clause by itself though its sentence drowns it. Whatever is released is scored as all
of these. Pure: reading a piece gives its texts and the reading of what comes behind it.
"""

from __future__ import annotations

import copy
import html
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from detox_guard.text.messages import strings_in
from detox_guard.text.sentences import sentences
from detox_guard.text.tools import ToolCall, ToolCallStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Asked", "Reading", "clauses", "read_sentences", "read_whole", "unescaped"]

_LONG_WORDS = 12
"""A piece of more words than this is scored clause by clause too."""
_SHORT_WORDS, _BACK_WORDS = 3, 6
"""A clause of fewer words than the first goes with the next one; where that is long, or there is none, with so many
words before it."""
_RUN_CHARS = 80
"""Lines of a few words each are scored together as well, the last so many characters of them."""
_WHOLE_CHARS = 40
"""What a unit's end may cut in two without a space: kept from before the unit even where no context is asked for."""
_DEEPEST = 4
"""JSON inside strings of JSON is read so far down."""

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_LETTER = re.compile(r"[^\W\d_]")
# Behind these a clause ends: marks of a sentence or list, brackets, dashes between words, tags, line breaks.
_BREAK = re.compile(
    r"(?<![,;:.!?…])[,;:.!?…]++[\"'”’»)]*+(?=\s)|[，、；：。！？]|\s[-–—]+\s|[–—]|--|[()\[\]{}|]|</?\w[^<>]*>|\n"
)
_CONJUNCTION = re.compile(
    r"\s(?=(?:and|but|or|so|yet|because|since|while|whereas|though|although|if|unless|when|then|which|who|that)\s)",
    re.IGNORECASE,
)


class Asked(NamedTuple):
    """The texts to score for something, none twice."""

    whole: tuple[str, ...]
    clauses: tuple[str, ...] = ()

    @classmethod
    def of(cls, whole: Iterable[str], parts: Iterable[str] = ()) -> Asked:
        found = dict.fromkeys(whole)
        return cls(tuple(found), tuple(part for part in dict.fromkeys(parts) if part not in found))

    @property
    def texts(self) -> tuple[str, ...]:
        return self.whole + self.clauses

    def worst(self, scores: Sequence[float], threshold: float) -> float:
        """The highest of the scores of `texts` that count. A clause out of its sentence says less, so it must be surer:
        its score counts from half-way between the threshold and 1 on."""
        count = len(self.whole)
        sure = (1 + threshold) / 2
        return max([*scores[:count], *(score for score in scores[count:] if score > sure)], default=0.0)


def clauses(text: str, since: int = 0) -> list[str]:
    """The clauses of `text` that end behind character `since`; none if what stands there is short and begins a clause.

    They cover the text. A clause of one or two words goes with a neighbour; of a long one there are overlapping
    windows.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    ends = {len(words)}
    for match in _BREAK.finditer(text):
        ends.add(_words_before(words, match.end()))
    first = _words_before(words, since)
    if len(words) - first <= _LONG_WORDS and (first == 0 or first in ends):
        return []
    spans: list[tuple[int, int]] = []
    begin = short = 0  # short: where a clause ends that is too short to stand alone
    for end in sorted(ends - {0}):
        if end - begin < _SHORT_WORDS:
            short = end
            continue
        if short > begin and end - begin > _BACK_WORDS:  # it would drown in the next one
            spans.append((max(0, short - _BACK_WORDS), short))
        spans += _windows(text, words, begin, end)
        begin = end
    if begin < len(words):
        spans.append((max(0, len(words) - _BACK_WORDS), len(words)))
    found = [text[words[a][0] : words[b - 1][1]] for a, b in spans if b > first]
    return [clause for clause in dict.fromkeys(found) if clause != text.strip()]


def _words_before(words: list[tuple[int, int]], at: int) -> int:
    """How many words begin before character `at`."""
    low, high = 0, len(words)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if words[middle][0] < at else (low, middle)
    return low


def _windows(text: str, words: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """A clause, in words; one that is too long is cut before conjunctions, or into overlapping windows."""
    if end - begin <= _LONG_WORDS:
        return [(begin, end)]
    cuts = [
        _words_before(words, match.end())
        for match in _CONJUNCTION.finditer(text, words[begin][1], words[end - 1][0])
    ]  # fmt: skip
    parts: list[tuple[int, int]] = []
    for cut in [*cuts, end]:
        if cut - begin >= _SHORT_WORDS or cut == end:
            parts.append((begin, cut))
            begin = cut
    out = []
    for a, b in parts:
        starts = range(a, max(a + 1, b - _LONG_WORDS // 2), _LONG_WORDS // 2) if b - a > _LONG_WORDS else [a]
        out += [(start, min(b, start + _LONG_WORDS)) if b - a > _LONG_WORDS else (a, b) for start in starts]
    return out


# --- escapes ---------------------------------------------------------------------------------------------------------

_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\(?:u([dD][89abAB]{_HEX}{{2}})\\u([dD][c-fC-F]{_HEX}{{2}})"
    rf"|(?:u({_HEX}{{4}})|u\{{({_HEX}{{1,6}})\}}|U({_HEX}{{8}})|x({_HEX}{{2}}))|(.))",
    re.DOTALL,
)
_CUT = re.compile(
    rf"(?<!\\)(?:\\\\)*(\\(?:u[dD][89abAB]{_HEX}{{2}}(?:\\(?:u{_HEX}{{0,3}})?)?"
    rf"|u{_HEX}{{0,3}}|u\{{{_HEX}{{0,6}}|U{_HEX}{{0,7}}|x{_HEX}?)?)\Z"
)
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v"}


def unescaped(text: str) -> str:
    """The text with its escapes (of JSON, and of Python and JavaScript) read; what is none loses its backslash."""

    def read(match: re.Match[str]) -> str:
        high, low, *codes, sign = match.groups()
        if sign is not None:
            return _NAMED.get(sign, sign)
        if high is not None:
            return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00)
        code = int(next(code for code in codes if code is not None), 16)
        return "\N{REPLACEMENT CHARACTER}" if 0xD800 <= code < 0xE000 or code > 0x10FFFF else chr(code)

    return _ESCAPE.sub(read, text)


def _cut_escape(text: str) -> int:
    """Length of the escape that the end of `text` cuts in two."""
    # Not more than the end: an escape is short, and only the backslashes just before it say whether it is one.
    found = _CUT.search(text, _backslashes_from(text)) if "\\" in text[-12:] else None
    return len(found[1]) if found else 0


def _backslashes_from(text: str) -> int:
    """Where the run of backslashes begins that the last characters of `text` belong to."""
    at = max(0, len(text) - 12)
    while at > 0 and text[at - 1] == "\\":
        at -= 1
    return at


# --- reading ---------------------------------------------------------------------------------------------------------

_BODY = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_MARK = re.compile(r'["{}\[\]]')
_LITERAL = re.compile(r"\b(?:true|false|null|None|True|False)\b")


@dataclass(frozen=True, eq=False)
class Reading:
    """How far a text has been read, and what must be remembered of it."""

    context: int = 0
    """A piece is scored together with so many characters before it, too."""
    level: int = 0
    """Strings of JSON that this text stands inside."""
    tail: str = ""
    """The end of what was read; its last `context` characters."""
    run: str = ""
    """The lines of a few words each that came last."""
    begun: bool = False
    depth: int = 0
    """Brackets that are open."""
    string: Reading | None = None
    """The open string of JSON, decoded."""
    whole: str = ""
    """All of the open string that came in earlier pieces."""
    cut: str = ""
    """The beginning of an escape, to be read with what comes."""
    plain: str = ""
    """The end of what stood outside of such strings, with its escapes read."""
    spelt: bool = False
    """There were some in the last piece."""
    calls: ToolCallStream = field(default_factory=ToolCallStream)
    called: bool = False
    content: str = ""
    """The end of the content, without the calls in it."""

    def read(self, piece: str, *, final: bool = False) -> tuple[Asked, Reading]:
        """What to score for this piece, and the reading of what comes behind it.

        The first text is the piece itself, the second the piece with what stands before it; of a short one in prose
        there are no more. `final`: nothing comes behind it.
        """
        if not piece and not (final and self.string is not None):
            return Asked(()), self
        texts, parts = [piece, self.tail + piece], []
        strings, outside, after = self._parse(piece, final)
        if strings:
            outside = _LITERAL.sub("", outside)
            if _LETTER.search(outside):
                texts.append(outside)
                parts += clauses(outside)
        else:
            parts += clauses(self.tail + piece, len(self.tail))
        for string in strings:
            texts += string.whole
            parts += string.clauses
        plain = html.unescape(unescaped(outside))  # single quotes, say, or an escape or entity in plain text
        if plain != outside or self.spelt:
            texts += [plain, self.plain + plain]
            parts += clauses(self.plain + plain, len(self.plain))
            if "\\" in plain:
                texts.append(unescaped(plain))
        short = len(_WORD.findall(piece)) <= _SHORT_WORDS
        if self.context and short and not strings:
            texts.append(self.run + piece)
        if self.level == 0:
            after, shown = after._without_calls(piece, final)
            texts += shown.whole
            parts += shown.clauses
        seen = [text for text in texts if text == piece or text.strip()]  # blank as it may be, the piece is scored
        return Asked.of(seen, parts), replace(
            after,
            spelt=plain != outside,
            plain=self._end(self.plain + plain),
            tail=(self.tail + piece)[-self.context :] if self.context else "",
            run=(self.run + piece)[-_RUN_CHARS:] if short else "",
        )

    def skip(self, piece: str, instead: str = "") -> Reading:
        """The reading behind a piece that no reader gets; `instead` stands in its place."""
        _, after = self.read(piece)
        string = replace(after.string, tail="", run="") if after.string else None
        tail = (self.tail + instead)[-self.context :] if self.context else ""
        return replace(
            after, tail=tail, run="", plain="", content=self._end(self.content + instead), string=string, whole=""
        )

    def _parse(self, piece: str, final: bool) -> tuple[list[Asked], str, Reading]:
        """What to score of the strings of JSON in this piece; what stands outside of them; the reading behind it."""
        text, at = self.cut + piece, 0
        depth, string, whole, begun, cut = self.depth, self.string, self.whole, self.begun, ""
        asked: list[Asked] = []
        outside: list[str] = []
        while at < len(text):
            if string is None:
                mark = _MARK.search(text, at)
                end = len(text) if mark is None else mark.end()
                begun_here = begun or bool(text[at : end - (mark is not None)].strip())
                opens = mark is not None and mark[0] == '"' and (depth > 0 or not begun_here) and self.level < _DEEPEST
                outside.append(text[at:end])
                begun, at = begun or bool(text[at:end].strip()), end
                if opens:
                    string = Reading(max(self.context, _WHOLE_CHARS), self.level + 1)
                    whole = ""
                elif mark is not None and mark[0] != '"':
                    depth = max(0, depth + (1 if mark[0] in "{[" else -1))
                continue
            body = _BODY.match(text, at)
            assert body is not None
            closed = body.end() < len(text) and text[body.end()] == '"'
            raw, at = text[at:] if not closed else body[0], body.end() + 1 if closed else len(text)
            if not closed and not final and (held := _cut_escape(raw)):
                cut, raw = raw[-held:], raw[:-held]
            decoded = unescaped(raw)
            own, string = string.read(decoded, final=closed or final)
            asked.append(own)
            whole += decoded
            if closed:
                asked.append(Asked((whole,)))
                string, whole = None, ""
                outside.append('"')
        if string is None and not final and (held := _cut_escape(text)):
            cut = text[-held:]
            outside[-1] = outside[-1][:-held]
        after = replace(self, depth=depth, string=string, whole=whole, begun=begun, cut=cut)
        return asked, "".join(outside), after

    def _without_calls(self, piece: str, final: bool) -> tuple[Reading, Asked]:
        """The reading behind this piece, and content that a call parted, joined as a reader has it."""
        calls = _copied(self.calls)
        parts = calls.push(piece) + (calls.flush() if final else [])
        shown = "".join(part for part in parts if isinstance(part, str))
        called = self.called or bool(calls.invalid) or any(isinstance(part, ToolCall) for part in parts)
        joined = self.content + shown
        # What a call says is scored as the tool gets it, whatever the call is written in.
        said = [text for part in parts if isinstance(part, ToolCall) for text in strings_in(part.arguments)]
        texts, own = list(said), [clause for text in said for clause in clauses(text)]
        if called and shown and joined not in self.tail + piece:
            texts += (shown, joined)
            own += clauses(joined, len(self.content))
        asked = Asked.of(texts, own)
        return replace(self, calls=calls, called=called, content=self._end(joined)), asked

    def _end(self, content: str) -> str:
        return content[-max(self.context, _WHOLE_CHARS) :]


def _copied(calls: ToolCallStream) -> ToolCallStream:
    """What it reads from here on the other does not see. (A deep copy would take the formats apart as well.)"""
    other = copy.copy(calls)
    for name, value in vars(other).items():
        if isinstance(value, list | dict | set):
            setattr(other, name, copy.copy(value))
    return other


# --- whole texts -----------------------------------------------------------------------------------------------------


def read_sentences(text: str) -> list[tuple[str, Asked]]:
    """The sentences of a whole text, which joined are the text, each with what to score for it."""
    reading = Reading()
    found = []
    parts = sentences(text)
    for i, part in enumerate(parts):
        asked, reading = reading.read(part, final=i == len(parts) - 1)
        found.append((part, asked))
    return found


def read_whole(text: str) -> Asked:
    """What to score for a whole text: itself, and all that is scored for its sentences."""
    each = [asked for _, asked in read_sentences(text)]
    return Asked.of(
        [text, *(one for asked in each for one in asked.whole)], [one for asked in each for one in asked.clauses]
    )
