"""Text as a reader reads it: look-alikes, invisible characters, markup and spelling tricks undone before it is scored.

Knows characters and spelling. Knows no weights: whether a word that was put together is rude is asked of whoever calls.
`normalised` holds for every text and harms none. `undisguised` guesses, so it changes a text only where a guess gives a
rude word.
"""

from __future__ import annotations

import html
import itertools
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["normalised", "undisguised"]

BLANK = "\u2800"
"""Stands for each character that is a letter or sign by its class and blank on the screen: a gap, or nothing at all."""

_BLANKS = dict.fromkeys((0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0), BLANK)
_INVISIBLE = frozenset(("Cf", "Mn", "Me", "Cc", "Co", "Cn", "Cs"))
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]+")
_LONG_RUN = re.compile(r"(.)\1{3,}", re.DOTALL)
_FOREIGN_WORD = re.compile(r"[^\W\d_]*[^\W\d_\x00-\x7f][^\W\d_]*")


def _look_alikes() -> dict[int, str]:
    """Letters that look like a Latin one and that NFKC, case folding and NFD leave as they are."""
    rows = (
        "aаαɑᴀꭺꓮɐ bьвβʙᴃꮟᏼꓐ cсϲᴄꮯꓚͻↄ dԁɗᴅꮷꭰꓓđɖ eеεєᴇɛꭼꓰǝəɘё fғϝꜰꓝƒ gԍɡɢꮐꓖġ hһнηհʜꮋꓧћħ iіιıɪӏꭵꓲɨⅰǀ jјϳᴊꭻꓙʝ "
        "kкκᴋꮶꓗқ lʟꮮꓡłǀⅼɭ mмᴍꮇꓟɱ nոпηɴꓠпɲŋ oоοσօᴏꮎꓳөøσ০๐ pрρᴘꮲꓑƿ qԛգɋ rгʀᴦꮢꓣɾɹ sѕʂꜱꮪꓢ tтτᴛꭲꓔŧ uυսᴜꓴʉцս vνѵᴠꮩꓦ "
        "wԝωᴡꮃꓪшɯ xхχꓫ×ҳ yуγүʏꮍꓬʎ zᴢꮓꓜʐƶ"
    )
    table: dict[int, str] = {}
    for row in rows.split(" "):
        for sign in row[1:]:
            folded = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", sign).casefold())[:1]
            if folded and not folded.isascii():
                table.setdefault(ord(folded), row[0])
    for first in (0x1F150, 0x1F170, 0x1F1E6):  # white on black, and the letters that flags are made of
        table |= {first + index: chr(ord("a") + index) for index in range(26)}
    return table


_LOOK_ALIKES = _look_alikes()
_SQUARED = re.compile("[\U0001f150-\U0001f189\U0001f1e6-\U0001f1ff]")


def normalised(text: str) -> str:
    """The text in lower case, as it looks: HTML entities decoded, NFKC, no accents, nothing invisible, no look-alikes.

    A word of another script becomes Latin only where every letter of it looks Latin. A run of more than three of a
    character is cut to three. Punctuation and line breaks stay. Linear in the length.
    """
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = unicodedata.normalize("NFD", text.casefold()).translate(_BLANKS)
        text = "".join(c for c in text if c < "\x7f" or unicodedata.category(c) not in _INVISIBLE)
        text = _SQUARED.sub(lambda match: _LOOK_ALIKES[ord(match[0])], text)
        text = _FOREIGN_WORD.sub(_latin, text)
    return _LONG_RUN.sub(r"\1\1\1", _CONTROLS.sub("", text.casefold()))


def _latin(match: re.Match[str]) -> str:
    word = match[0].translate(_LOOK_ALIKES)
    return word if word.isascii() else match[0]


# --- guesses ------------------------------------------------------------------------------------------------------

_LEET = str.maketrans("0134567892@$!|+€¢£¥", "oieasgtbgzasiitecly")
_LEET_L = _LEET | str.maketrans("1!|", "lll")
_LETTERS_ONLY = re.compile(r"[^a-z]+")
_TAGS = re.compile(r"<(?:!--[^<>]{0,60}--|/?[a-z][^<>]{0,60})>|\]\([^()\s]{0,60}\)")
_EDGES = ".,;:?\"'()[]{}<>…*_~`#-–—/\\“”‘’" + BLANK
_TOKEN = re.compile(r"\S{3,48}")
_BROKEN = re.compile(r"(?=(?<![^\W_])([a-z]{1,12})(?:-|‐|\u2010)?[ \t]*\n\s*([a-z]{1,12})(?![^\W_]))")
_BROKEN_TWICE = re.compile(r"(?=(?<![^\W_])([a-z]{1,8})-?[ \t]*\n\s*([a-z]{1,8})-?[ \t]*\n\s*([a-z]{1,8})(?![^\W_]))")
_SPACED = re.compile(
    r"(?<!\S)\S(?!\S)(?:\s{1,3}\S(?![^\W_])){2,63}+|(?<![^\W_])[^\W_](?:[\W_]{1,5}[^\W_](?![^\W_])){2,63}+"
)
_HIDDEN = re.compile(r"(?<=[a-z])(?:[*#]{1,2}|[_.@-])(?=[a-z])")
"""Signs in the place of one vowel, or of two."""
_REPEATED = re.compile(r"(?<![^\W_])(?=[a-z]{0,24}?([a-z])\1)[a-z]{4,32}(?![^\W_])")
_RUN = re.compile(r"([a-z])\1+")
_SHORTEST, _LONGEST = 4, 16
"""Letters of a word that is looked for among letters which stand apart."""


def undisguised(text: str, rude: Callable[[Sequence[str]], Sequence[float]]) -> str:
    """A normalised text with the rude words that its spelling hides: digits and signs for letters, letters set apart or
    repeated, marks or tags inside a word, a word broken over lines. The text itself where none is found.

    `rude` says of each word how rude it is, 0 where it is not; of words that overlap the rudest counts. Linear in the
    length.
    """
    bare = _TAGS.sub("", text) if "<" in text or "](" in text else text
    spans: list[tuple[int, int, list[str]]] = []
    for match in _SPACED.finditer(bare):
        spans += _apart(match)
    for match in _TOKEN.finditer(bare):
        spans += _spelt(match)
    for match in _REPEATED.finditer(bare):
        if words := _shorter(match[0]):
            spans.append((*match.span(), words))
    for broken in (_BROKEN, _BROKEN_TWICE):
        for match in broken.finditer(bare) if "\n" in bare else ():
            spans.append((match.start(1), match.end(match.re.groups), ["".join(match.groups())]))
    if bare is not text:
        spans += [(*match.span(), [match[0]]) for match in re.finditer(r"[a-z]{3,32}", bare)]
    if not spans:
        return text
    guesses = [(start, stop, word) for start, stop, words in spans for word in words]
    answers = rude([word for *_, word in guesses])
    found = [(rudeness, *guess) for rudeness, guess in zip(answers, guesses, strict=True) if rudeness > 0]
    return _replaced(bare, found) if found else text


def _apart(match: re.Match[str]) -> Iterator[tuple[int, int, list[str]]]:
    """Words that signs set apart may spell: all of them, or the letters and digits alone."""
    signs = [(match.start() + at, sign, sign.translate(_LEET)) for at, sign in enumerate(match[0])]
    if sum(map(str.isalpha, match[0])) < 2:
        return
    letters = [(at, letter) for at, _, letter in signs if letter.isalpha()]
    plain = [(at, letter) for at, sign, letter in signs if sign.isalnum() and letter.isalpha()]
    for row in (letters, plain) if letters != plain else (letters,):
        run = "".join(letter for _, letter in row)
        for first in range(len(run)):
            for last in range(first + _SHORTEST, min(len(run), first + _LONGEST) + 1):
                yield row[first][0], row[last - 1][0] + 1, [run[first:last]]


def _spelt(match: re.Match[str]) -> Iterator[tuple[int, int, list[str]]]:
    """Words that a token with digits or signs in it may spell."""
    token = match[0]
    if token.isalpha():
        return
    core = token.strip(_EDGES).rstrip("!|+")
    if core.isalpha() or sum(map(str.isalpha, core)) < (2 if len(core) < 4 else 1):
        return
    start = match.start() + token.index(core)
    words = {
        _LETTERS_ONLY.sub("", core) if not any(map(str.isdigit, core)) else "",
        *(_LETTERS_ONLY.sub("", core.translate(table)) for table in (_LEET, _LEET_L)),
        _LETTERS_ONLY.sub("", re.sub(r"[^\w]|_", "", core).translate(_LEET)),
    }
    if len(hidden := _HIDDEN.findall(core)) == 1:
        size = len(hidden[0])
        words |= {_HIDDEN.sub("".join(vowels), core) for vowels in itertools.product("aeiou", repeat=size)}
    words |= {short for word in words if _RUN.search(word) for short in _shorter(word)}
    yield start, start + len(core), sorted(word for word in words if len(word) > 2)


def _shorter(word: str) -> list[str]:
    """The word with its repeated letters once or twice; none if it has no run of three and but one of two."""
    runs = [match.span() for match in _RUN.finditer(word)]
    if len(runs) < 2 and runs[0][1] - runs[0][0] < 3:
        return []
    choices = itertools.product((1, 2), repeat=len(runs)) if len(runs) <= 3 else [(1,) * len(runs)]
    shorter = []
    for choice in choices:
        sizes = iter(choice)
        shorter.append(_RUN.sub(lambda match, sizes=sizes: match[1] * next(sizes), word))  # type: ignore[misc]
    return shorter


def _replaced(text: str, found: list[tuple[float, int, int, str]]) -> str:
    """The text with the words found in place of their spans, the rudest where they overlap."""
    kept: list[tuple[int, int, str]] = []
    taken = bytearray(len(text))
    for _, start, stop, word in sorted(found, key=lambda item: (-item[0], item[1])):
        if not any(taken[start:stop]):
            taken[start:stop] = b"\1" * (stop - start)
            kept.append((start, stop, word))
    pieces, at = [], 0
    for start, stop, word in sorted(kept):
        pieces += [text[at:start], " ", word, " "]
        at = stop
    return "".join([*pieces, text[at:]])
