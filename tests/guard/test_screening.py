"""Screening: toxic texts are dropped, masked or marked, in one call of the scorer, and never passed unscored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detox_guard import InvalidParamsError, ScorerError, Screened, screen
from detox_guard.guard.screen import SCREEN_NOTE

if TYPE_CHECKING:
    from collections.abc import Sequence


class BadWord:
    """Scores .9 what says "bad", .6 what says "so so" twice."""

    name = "bad-word"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.calls.append(list(texts))
        return [0.9 if "bad" in text else 0.6 if text.count("so so") > 1 else 0.1 for text in texts]


KIND, BAD = "A kind word. Another one!", "Kind first. Then a bad one! And (too bad.) Kind last."


def test_each_action_and_its_scores_in_order() -> None:
    texts = [KIND, BAD, ""]
    assert screen(texts, scorer=BadWord()) == [
        Screened(KIND, 0.1, False),
        Screened(None, 0.9, True),
        Screened("", 0.1, False),
    ]
    assert screen(texts, scorer=BadWord(), action="mark")[1] == Screened(BAD, 0.9, True)
    assert screen(texts, scorer=BadWord(), action="mask")[1].text == f"Kind first. {SCREEN_NOTE} Kind last."
    assert screen(texts, scorer=BadWord(), threshold=0.9) == [
        Screened(KIND, 0.1, False),
        Screened(BAD, 0.9, False),
        Screened("", 0.1, False),
    ]


def test_masking_keeps_lines_and_hides_all_where_no_sentence_is_toxic_alone() -> None:
    masked = screen(["# Title\n\nbad line\nkind line", "It is so so. It was so so."], scorer=BadWord(), action="mask")
    assert [one.text for one in masked] == [f"# Title\n\n{SCREEN_NOTE}\nkind line", SCREEN_NOTE]
    assert masked[1].score == 0.6


def test_the_scorer_is_called_once() -> None:
    scorer = BadWord()
    screen([KIND, BAD, "one"], scorer=scorer)
    assert len(scorer.calls) == 1
    assert scorer.calls[0][0] == KIND
    assert scorer.calls[0].count("one") == 1


@given(st.lists(st.text(st.sampled_from("ab.!? \n。"), max_size=40), max_size=4), st.sampled_from(["mask", "mark"]))
def test_a_clean_text_is_passed_on_as_it_is(texts: list[str], action: Any) -> None:
    clean = [text for text in texts if "bad" not in text]
    assert [one.text for one in screen(clean, scorer=BadWord(), action=action)] == clean


def test_the_embedded_scorer_is_the_default() -> None:
    kind, rude = screen(["The museum opens at nine. Tickets are sold inside.", "What a stupid idiot you are."])
    assert (kind.flagged, rude.flagged) == (False, True)


@pytest.mark.parametrize("answer", [[], [0.1, float("nan")], [0.1, 1.5], RuntimeError("gone")])
def test_a_failing_scorer_lets_nothing_through(answer: Any) -> None:
    class Failing:
        name = "failing"

        def score(self, texts: Sequence[str]) -> list[float]:
            if isinstance(answer, Exception):
                raise answer
            return list(answer)

    with pytest.raises(ScorerError, match="failing"):
        screen(["one", "two"], scorer=Failing())


@pytest.mark.parametrize(
    ("texts", "changes", "field"),
    [
        (["a"], {"action": "hide"}, "action"),
        (["a"], {"threshold": 1.5}, "threshold"),
        (["a"], {"threshold": float("nan")}, "threshold"),
        (["a"], {"threshold": True}, "threshold"),
        (["a", None], {}, "texts[1]"),
        ("a text", {}, "texts"),
    ],
)
def test_what_cannot_be_screened_is_named(texts: Any, changes: Any, field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        screen(texts, **changes)
    assert caught.value.field == field
