"""The minilm scorer, where its encoder is in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from measuring import KIND, PLAIN, RUDE

from detox_guard.errors import ScorerError
from detox_guard.scorers.base import ToxicityScorer, checked_scores, load_scorer
from detox_guard.scorers.minilm import MiniLMScorer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def minilm() -> ToxicityScorer:
    scorer = load_scorer("minilm")
    try:
        scorer.score(["a"])
    except ScorerError as error:
        pytest.skip(f"needs the encoder of the minilm scorer in the cache: {error}")
    return scorer


def test_minilm_scores(minilm: ToxicityScorer) -> None:
    assert load_scorer("minilm") is minilm
    assert minilm.name == "minilm"
    texts = [RUDE, KIND, PLAIN * 60 + RUDE, PLAIN * 60, "", "\ud800", "!?", "You are an i.d.i.o.t."]
    together = checked_scores(minilm, texts)
    assert together == pytest.approx([checked_scores(minilm, [text])[0] for text in texts], abs=1e-4)
    rude, kind, buried, plain, *empty, dotted = together
    assert min(rude, buried, dotted) > 0.5
    assert max(kind, plain) < 0.1
    assert empty == [0.0, 0.0, 0.0]
    assert len(minilm.fingerprint) > 64  # type: ignore[attr-defined]


def test_minilm_without_the_encoder_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path))
    monkeypatch.setattr("detox_guard.scorers.minilm.offline", lambda: True)
    with pytest.raises(ScorerError, match="HF_HUB_OFFLINE") as caught:
        MiniLMScorer().score(["a"])
    assert caught.value.hint
