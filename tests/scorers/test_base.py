"""What every scorer must keep to, what is done where one does not, and how one is found by its name."""

from __future__ import annotations

import math
import sys
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

from detox_guard.errors import ScorerError
from detox_guard.scorers import base
from detox_guard.scorers.base import ToxicityScorer, checked_scores, load_scorer
from detox_guard.scorers.classifier import HuggingFaceScorer
from detox_guard.scorers.linear import EmbeddedScorer


class Fixed:
    name = "fixed"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def score(self, texts: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_scorers_meet_the_protocol() -> None:
    assert isinstance(EmbeddedScorer.load(), ToxicityScorer)
    assert isinstance(HuggingFaceScorer("x"), ToxicityScorer)
    assert isinstance(Fixed([]), ToxicityScorer)
    assert not isinstance("x", ToxicityScorer)


@pytest.mark.parametrize(
    "answer",
    [
        *([], [0.1, 0.2], [math.nan], [1.01], [-0.01], [math.inf], ["x"], ["0.5"], [b"0"], [None], None, 0.5),
        *({0: 0.97}, {"a": 0.1}.values(), "0", "1", b"\0", bytearray(1), memoryview(b"\0"), {0.5}, frozenset({0.5})),
        *(iter([0.5]), (score for score in [0.5]), range(5)),
    ],
)
def test_checked_scores_fails_closed(answer: Any) -> None:
    with pytest.raises(ScorerError, match="fixed"):
        checked_scores(Fixed(answer), ["a"])


def test_checked_scores_chains_the_cause_and_passes_good_numbers() -> None:
    with pytest.raises(ScorerError, match="boom") as caught:
        checked_scores(Fixed(RuntimeError("boom")), ["a"])
    assert isinstance(caught.value.__cause__, RuntimeError)
    for good in ([0, 1.0], (0.0, 1), np.array([0.0, 1.0]), np.array([0, 1], dtype=np.float32)):
        assert checked_scores(Fixed(good), ["a", "b"]) == [0.0, 1.0]
    assert checked_scores(Fixed(RuntimeError("never called")), []) == []


def test_load_scorer() -> None:
    assert load_scorer() is load_scorer("embedded")
    mine = Fixed([])
    assert load_scorer(mine) is mine
    assert isinstance(load_scorer("some/model"), HuggingFaceScorer)
    with pytest.raises(ScorerError):
        load_scorer(3)  # type: ignore[arg-type]


def test_a_package_may_bring_a_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(**wanted: str) -> tuple[EntryPoint, ...]:
        own = {
            "plugged": ("collections:UserList",),  # it has no name
            "broken": ("no.such:thing",),
            "twice": ("a:b", "c:d"),
            "fixed": (f"{__name__}:made",),
        }
        assert wanted["group"] == "detox_guard.scorers"
        return tuple(EntryPoint(wanted["name"], value, wanted["group"]) for value in own.get(wanted["name"], ()))

    monkeypatch.setattr(base, "entry_points", points)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or type(sys)(__name__))
    monkeypatch.setattr(sys.modules[__name__], "made", lambda: Fixed([0.25]), raising=False)
    mine = load_scorer("fixed")
    assert load_scorer("fixed") is mine
    assert checked_scores(mine, ["a"]) == [0.25]
    for name, said in (("plugged", "is no scorer"), ("broken", "no.such"), ("twice", "2 packages")):
        with pytest.raises(ScorerError, match=said):
            load_scorer(name)
    assert isinstance(load_scorer("neither/plugged"), HuggingFaceScorer)
