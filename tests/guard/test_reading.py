"""What is judged is what a reader gets: strings decoded, content joined, clauses by themselves, wherever units end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detox_guard.guard.units import Asked, Reading, clauses, read_sentences, read_whole, unescaped
from detox_guard.scorers.base import load_scorer
from detox_guard.text.tools import parse_tool_calls

if TYPE_CHECKING:
    from collections.abc import Sequence

LONG = (
    "The library opens at nine, visitors may borrow ten books for three weeks, the reading room is quiet and bright, "
)


def asked(pieces: Sequence[str], context: int = 200) -> list[str]:
    """All that is scored for a text that comes in these pieces."""
    reading, texts = Reading(context), list[str]()
    for i, piece in enumerate(pieces):
        one, reading = reading.read(piece, final=i == len(pieces) - 1)
        texts += one.texts
    return texts


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False) if a < b]


def spelt_out(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" if c.isalpha() else c for c in text)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"an \u0069d\u0069ot", "an idiot"),
        (r"shut\nup,\tnow\/", "shut\nup,\tnow/"),
        (r"\ud83d\ude00 \"ok\" \\", '\U0001f600 "ok" \\'),
        (r"\x69\u{64}\U00000069ot", "idiot"),
        (r"\ud800 \udc00 \U00110000", "\ufffd \ufffd \ufffd"),
        (r"C:\user \u12", "C:user u12"),
        ("no escape", "no escape"),
    ],
)
def test_escapes(text: str, plain: str) -> None:
    assert unescaped(text) == plain
    plain.encode()


def strings(value: Any) -> list[str]:
    """Keys and values, and what stands in a string that is JSON itself."""
    if isinstance(value, dict):
        return [text for key, part in value.items() for text in [*strings(key), *strings(part)]]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    if not isinstance(value, str) or not value.strip():
        return []
    try:
        inner = json.loads(value) if value[:1] in "{[" else None
    except ValueError:
        inner = None
    return [value, *strings(inner)]


words = st.text(st.sampled_from('ab \n"\\/{}[]:,.é💥\u2028'), max_size=12)
values = st.recursive(
    st.one_of(words, st.none(), st.booleans(), st.integers(-99, 99)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(words, inner, max_size=3),
        st.dictionaries(words, inner, max_size=2).map(json.dumps),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(
    value=st.one_of(st.lists(values, max_size=3), st.dictionaries(words, values, max_size=3), words),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    places=st.lists(st.integers(0, 10_000), max_size=6),
    context=st.sampled_from([0, 7, 200]),
)
def test_every_string_of_json_is_scored_whole_however_it_is_cut(
    value: Any, ascii_only: bool, indent: int | None, places: list[int], context: int
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert set(strings(value)) <= set(asked(cut(text, places), context))


@pytest.mark.parametrize("places", [[n] for n in range(0, 150, 7)] + [[9, 20, 70, 75], list(range(0, 150, 3))])
@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "post", "arguments": {"text": "%s"}}\n</tool_call>',
        '{"name": "post", "parameters": {"text": "%s"}}',
        '[TOOL_CALLS] [{"name": "post", "arguments": {"text": "%s"}}]',
        'Here you are:\n```json\n{"answers": [{"text": "%s", "sure": true}]}\n```\n',
        '{"%s": 1}',
        '"%s"',
        '[post(text="%s")]',
    ],
)
def test_a_unit_that_ends_inside_a_string_is_read_decoded(text: str, places: list[int]) -> None:
    insult = "You are a complete idiot."
    pieces = cut(text % spelt_out(insult), places)
    assert insult in asked(pieces)
    # Flagged with the unit that completes the word, not only where the string ends.
    reading = Reading(200)
    for so_far, piece in zip(["".join(pieces[: i + 1]) for i in range(len(pieces))], pieces, strict=True):
        one, reading = reading.read(piece)
        if spelt_out("idiot") in so_far:
            assert any("idiot" in scored for scored in one.texts)
            break


@pytest.mark.parametrize(
    "text", ["post(text='you \\x69diot')", "You \\u0069diot.", "You &#105;diot.", "{'a': 'you \\u0069diot'}"]
)
def test_escapes_outside_of_json_are_read_too(text: str) -> None:
    assert any("you idiot" in scored.lower() for scored in asked([text]))


@given(places=st.lists(st.integers(0, 200), max_size=4), context=st.sampled_from([0, 200]))
def test_content_is_joined_as_a_reader_joins_it(places: list[int], context: int) -> None:
    call = '<tool_call>\n{"name": "post", "arguments": {"text": "x"}}\n</tool_call>'
    for text in (f"You are an id{call}iot, friend.", f"You are an i{call}d{call}iot, friend."):
        content, _, _ = parse_tool_calls(text)
        texts = asked(cut(text, places), context)
        assert any(content[content.index(" i") : content.index("iot") + 3] in scored for scored in texts)


def test_text_that_only_looks_like_something_else_costs_nothing_more() -> None:
    reading = Reading(200)
    for piece in (
        "It rains today in the old town. ",
        'He said: "We stay at home." ',
        "Use <b> and 3 < 4, all of you. ",
    ):
        one, after = reading.read(piece)
        assert one.texts == tuple(dict.fromkeys((piece, reading.tail + piece)))
        reading = after


@pytest.mark.parametrize(
    "end", ["you are a complete idiot.", "go away, loser!", "idiot!", "which only an idiot would say."]
)
def test_a_clause_is_scored_by_itself(end: str) -> None:
    found = clauses(LONG + end)
    assert any(end in clause and len(clause.split()) <= 7 for clause in found)
    middle = clauses(f"The library opens at nine, {end[:-1]}, and the reading room is quiet and bright all day long.")
    assert any(end[:-1] in clause and len(clause.split()) <= 8 for clause in middle)


@given(
    st.lists(st.sampled_from(["and", "rain", "falls,", "here.", "(so", "it)", "-", "\n", "今天", "which"]), max_size=60)
)
def test_clauses_cover_what_is_long(words: list[str]) -> None:
    text = " ".join(words)
    found = clauses(text)
    assert len(found) <= 2 + len(text.split())
    if found:
        assert set(text.split()) <= {word for clause in [text, *found] for word in clause.split()}
        assert all(clause in text for clause in found)


def test_a_clause_that_a_unit_s_end_cuts_is_scored_whole() -> None:
    first, second = (
        LONG + "you are a complete and utter ",
        "idiot, and the garden behind the house is open to all of us too. ",
    )
    reading = Reading(200)
    _, reading = reading.read(first)
    one, _ = reading.read(second)
    assert any(clause.endswith("idiot,") and "complete" in clause for clause in one.clauses)
    short, _ = reading.read("idiot. ")
    assert any(clause.endswith("utter idiot.") and len(clause.split()) <= 7 for clause in short.clauses)


def test_lines_of_a_word_each_are_read_together() -> None:
    reading = Reading(200)
    _, reading = reading.read("The library opens at nine in the morning, and closes at six in the evening.\n")
    texts: list[str] = []
    for line in ("You\n", "are\n", "an\n", "idiot\n"):
        one, reading = reading.read(line)
        texts += one.texts
    assert "You\nare\nan\nidiot\n" in texts


def test_a_clause_counts_only_if_it_is_surer() -> None:
    one = Asked.of(["whole", "with context"], ["clause", "whole"])
    assert one.texts == ("whole", "with context", "clause")
    assert one.worst([0.1, 0.2, 0.7], 0.5) == 0.2
    assert one.worst([0.1, 0.2, 0.8], 0.5) == 0.8
    assert one.worst([0.1, 0.6, 0.7], 0.5) == 0.6
    assert Asked(()).worst([], 0.5) == 0.0


def test_what_was_taken_out_is_not_read_again() -> None:
    reading = Reading(200)
    for text in ('{"a": "Bad. ', "Prose, bad. "):
        one, _ = reading.skip(text, "[removed] ").read('Good."}' if "{" in text else "Good.")
        assert not any("ad. Good" in scored for scored in one.texts)
        assert any("Good." in scored for scored in one.texts)


def test_whole_texts() -> None:
    text = 'It rains. {"text": "You \\u0069diot"} ' + LONG + "go away. Bye"
    parts = read_sentences(text)
    assert "".join(part for part, _ in parts) == text
    one = read_whole(text)
    assert one.whole[0] == text
    assert {"It rains. ", "You idiot"} <= set(one.whole)
    assert "go away." in " ".join(one.clauses)
    assert len(set(one.texts)) == len(one.texts)
    assert read_whole("").texts == ("",)


def test_insults_at_the_end_of_long_sentences_are_found_by_the_embedded_scorer() -> None:
    scorer = load_scorer()
    frames = ("you are a complete {}.", "what a {} you are!", "only a {} would say that.")
    flagged = 0
    for text in (LONG + frame.format(word) for frame in frames for word in ("idiot", "moron", "stupid fool")):
        one = read_whole(text)
        flagged += one.worst(scorer.score(one.texts), 0.5) > 0.5
    assert flagged >= 8


@pytest.mark.parametrize(
    "unit", [".", "\\", '{"', '"[{', "<a", "a,", " - ", "<tool_call>", '\\"', '\\\\"', "&#1;", "x\n", "a "]
)
def test_the_work_grows_with_the_length_alone(unit: str) -> None:
    reading = Reading(200)
    text = unit * (60_000 // len(unit))
    for at in range(0, len(text), 200):  # quadratic work would take hours
        _, reading = reading.read(text[at : at + 200])
    read_whole(text)


@pytest.mark.parametrize(
    "text",
    [
        "[say(text='You are a stu' 'pid idi' 'ot')]",
        r"[say(text='You are a \163\164\165\160\151\144 \151\144\151\157\164')]",
        r"[say(text='You are a stupid \N{LATIN SMALL LETTER I}diot')]",
        "<tool_call>\n<function=say>\n<parameter=text>\nYou are a stupid idiot\n</parameter>\n</function></tool_call>",
    ],
)
def test_a_call_is_scored_as_its_tool_gets_it(text: str) -> None:
    """Python joins strings and reads escapes that JSON does not know."""
    assert "You are a stupid idiot" in read_whole(text).texts
