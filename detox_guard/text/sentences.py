"""Where a text may be cut into units to be scored. Pure functions of text; knows no tokens, no scores.

Why our own: the kept sentence splitters read whole documents, while this must decide on text that is still growing and
never change its mind. A cut too many costs a score, a cut too few a delay; neither lets anything through unscored.
"""

from __future__ import annotations

import re

__all__ = ["in_code", "last_space", "sentence_end", "sentences"]

_FENCE = "```"
_LONGEST = 4096
_CLOSERS = "\"'”’»)\\]*_"
# A line's end; a full stop and what closes it, then space and the next visible character; or a CJK full stop.
_END = re.compile(
    r"(?P<line>[^\s][ \t]*\n\s*)"
    rf"|(?<![.!?…])(?P<stop>[.!?…]++)[{_CLOSERS}]*+(?P<space>\s++)(?=(?P<next>\S))"
    rf"|[。！？][{_CLOSERS}」』）]*"
)
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\S+",
        "mr mrs ms dr prof sr jr st mt rev gen col capt lt sgt gov sen rep hon no nos vol fig figs eq ch sec art pp ed "
        "eds vs cf al etc approx dept est inc ltd co corp jan feb mar apr jun jul aug sep sept oct nov dec e.g i.e a.m "
        "p.m u.s u.k u.n ph.d",
    )
)
_OFTEN_LAST = frozenset(("etc", "a.m", "p.m", "inc", "ltd", "co", "corp", "al", "jr", "sr", "u.s", "u.k", "ph.d"))
_LOOK_BACK = 32
"""Characters before a mark that may be a word to know: more than the longest of them has."""
_WORD = re.compile(r"[^\s(\[\"'“‘]+$")
_ITEM = re.compile(r"(?<!\S)(?:\d{1,3}|[A-Za-z])$")


def sentence_end(text: str, code: bool = False) -> int:
    """Length of the first sentence of `text` with the space behind it; 0 while it is not certain to have ended.

    Abbreviations, initials, decimals, list numbers and URLs do not end a sentence. Line ends do, outside code blocks
    (`code`: the text begins inside one), which are one piece up to their closing fence.
    """
    since = 0
    for match in _END.finditer(text):
        # What ends here ends behind a space or a full stop, so no fence lies on both sides of it.
        code, since = in_code(text[since : match.end()], code), match.end()
        if not code and (match["stop"] is None or _ends(text, match)):
            return match.end()
    return 0


def sentences(text: str) -> list[str]:
    """The sentences of a whole text, each with the white space behind it, so that joined they are the text.

    One of more than 4,096 characters is cut there: the work is linear in the length.
    """
    found, at = [], 0
    while at < len(text):
        piece = text[at : at + _LONGEST]
        end = sentence_end(piece) or len(piece)
        found.append(piece[:end])
        at += end
    return found


def in_code(text: str, code: bool = False) -> bool:
    """Whether the end of `text` lies inside a fenced code block, given whether its beginning did."""
    return code != (text.count(_FENCE) % 2 == 1)


def last_space(text: str) -> int:
    """Where the last word of `text` begins, its leading space included; 0 if there is but one word."""
    body = text.rstrip()
    if len(body) < len(text):
        return len(body)
    at = max(body.rfind(" "), body.rfind("\n"), body.rfind("\t"))
    return max(0, at)


def _ends(text: str, match: re.Match[str]) -> bool:
    """Whether a mark that was matched ends a sentence."""
    stop, space, following, at = match["stop"], match["space"], match["next"], match.start("stop")
    if "\n" in space or "!" in stop or "?" in stop:
        return "\n" in space or not following.islower()
    before = text[max(0, at - _LOOK_BACK) : at]
    if (item := _ITEM.search(before)) and _begins_line(text, at - len(item[0])):
        return False
    found = _WORD.search(before)
    word = found[0].lower() if found else ""
    if len(word) == 1 and word.isalpha() and word != "i":
        return False  # an initial
    if word in _ABBREVIATIONS:
        return word in _OFTEN_LAST and following.isupper()
    return not following.islower()


def _begins_line(text: str, at: int) -> bool:
    """Whether only white space stands between `at` and the line break, or the beginning, before it."""
    while at > 0 and text[at - 1].isspace():
        at -= 1
        if text[at] == "\n":
            return True
    return at == 0
