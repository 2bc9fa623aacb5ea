"""Where text may be cut: the hard cases of sentence ends, and that growing text never changes an earlier cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detox_guard.text.sentences import in_code, last_space, sentence_end
from detox_guard.text.sentences import sentences as all_sentences


def sentences(text: str) -> list[str]:
    parts, code = [], False
    while end := sentence_end(text, code):
        parts.append(text[:end])
        code = in_code(text[:end], code)
        text = text[end:]
    return [part.strip() for part in [*parts, text] if part.strip()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It rains. We stay. Good", ["It rains.", "We stay.", "Good"]),
        ("Dr. Smith met Mrs. Jones at 3.5 km. They talked.", ["Dr. Smith met Mrs. Jones at 3.5 km.", "They talked."]),
        ("See www.example.org/a.b?c=d! Then go.", ["See www.example.org/a.b?c=d!", "Then go."]),
        (
            "We saw birds, e.g. two gulls, i.e. sea birds. Nice.",
            ["We saw birds, e.g. two gulls, i.e. sea birds.", "Nice."],
        ),
        ("J. R. Brown wrote it. It sold.", ["J. R. Brown wrote it.", "It sold."]),
        ("1. Bread\n2. Butter\n3. Jam", ["1. Bread", "2. Butter", "3. Jam"]),
        ("They came at 5 p.m. Then they left.", ["They came at 5 p.m.", "Then they left."]),
        ('He said "Stop!" Then he sat.', ['He said "Stop!"', "Then he sat."]),
        ("Really?! Yes... it is. Ok", ["Really?!", "Yes... it is.", "Ok"]),
        ("今天天气很好。我们去公园！好吗", ["今天天气很好。", "我们去公园！", "好吗"]),
        ("Look:\n```\na = 1. b\nc = 2\n```\nDone. Now", ["Look:", "```\na = 1. b\nc = 2\n```", "Done.", "Now"]),
        ("no end at all", ["no end at all"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet="ab .!?\n`。1", max_size=60))
def test_growing_text_keeps_its_cuts(text: str) -> None:
    ends = [sentence_end(text[:n]) for n in range(len(text) + 1)]
    first = next((end for end in ends if end), 0)
    for n, end in enumerate(ends):
        if end and text[n - 1 : n].strip():  # the space behind a sentence may still grow
            assert text[:end].rstrip() == text[:first].rstrip()


@given(st.text(alphabet="ab .\n", max_size=40))
def test_last_space_is_before_the_last_word(text: str) -> None:
    at = last_space(text)
    assert at == 0 or text[at : at + 1].isspace()
    assert " " not in text[at:].strip()


@pytest.mark.parametrize(
    "text", ["a" * 200_000 + " " + "e.g. x " * 5_000, "." * 200_000, "\n" * 50_000 + "1. x " * 9_000]
)
def test_the_work_grows_with_the_length_alone(text: str) -> None:
    sentence_end(text)  # quadratic work would take hours
    assert "".join(all_sentences(text)) == text
