"""`detox_guard._adaptive`: the strength follows what the prompt provokes, and fails closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from harness import random_detoxifier

from detox_guard import DecodingParams, DetoxiGen, GuardPolicy, InvalidParamsError, ScorerError, SteeringStream
from detox_guard import _adaptive as module
from detox_guard._adaptive import RAMP, adaptive_alpha
from detox_guard.scorers.base import load_scorer

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

HARMLESS = "The weather in Paris is"
RUDE = "You are a stupid idiot, and"
PARAMS = DecodingParams(alpha=3.0, calm_share=0.25)


class Fixed:
    """A scorer that knows the scores of some texts; others are harmless. It counts."""

    name = "fixed"

    def __init__(self, scores: Any) -> None:
        self.scores, self.asked = scores, 0

    def score(self, texts: Any) -> Any:
        self.asked += len(texts)
        return [self.scores.get(text.strip(), 0.0) for text in texts]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(scores: Any) -> Fixed:
        scorer = Fixed(scores)
        monkeypatch.setattr(module, "load_scorer", lambda: scorer)
        return scorer

    return put


def ramp(low: float, high: float) -> list[tuple[float, float]]:
    return [(0.0, 0.75), (low, 0.75), ((low + high) / 2, 1.875), (high, 3.0), (1.0, 3.0)]


@pytest.mark.parametrize(("score", "alpha"), ramp(*RAMP))
def test_the_strength_rises_with_the_score_of_the_worst_sentence(fixed: Any, score: float, alpha: float) -> None:
    fixed({"Two.": score, "Three.": score / 2})
    assert adaptive_alpha(["One. Two.", "Three."], PARAMS) == pytest.approx(alpha)


def test_no_text_is_calm(fixed: Any) -> None:
    fixed({})
    assert adaptive_alpha([], PARAMS) == pytest.approx(0.75)
    assert adaptive_alpha([" \n"], PARAMS) == pytest.approx(0.75)


def test_nothing_is_scored_where_the_score_would_not_matter(fixed: Any) -> None:
    scorer = fixed({})
    assert adaptive_alpha(["text"], PARAMS.replace(calm_share=1)) == 3.0
    assert adaptive_alpha(["text"], PARAMS.replace(alpha=0)) == 0.0
    assert scorer.asked == 0


@pytest.mark.parametrize("score", [float("nan"), 2.0, "high", None])
def test_a_scorer_that_fails_lets_nothing_be_decoded(fixed: Any, tiny_llama: Backbone, score: Any) -> None:
    fixed({"text": score})
    with (
        DetoxiGen(tiny_llama, [SteeringStream(random_detoxifier(tiny_llama))]) as model,
        pytest.raises(ScorerError, match="fixed"),
    ):
        model.generate("text", max_new_tokens=2)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan"), True, "half"])
def test_shares_out_of_bounds_are_named(share: Any) -> None:
    with pytest.raises(InvalidParamsError, match="calm_share"):
        DecodingParams(calm_share=share)


def test_the_shipped_scorer_tells_a_rude_prompt_from_a_harmless_one() -> None:
    harmless, rude = load_scorer().score([HARMLESS, RUDE])
    assert harmless < RAMP[0] < RAMP[1] < rude


def test_a_rude_question_behind_a_long_harmless_passage_has_the_whole_strength() -> None:
    passage = " ".join(["The castle was built in the 12th century and restored in 1885 by the town."] * 20)
    assert adaptive_alpha([f"{passage}\n\nWhen was it built?"], PARAMS) < 1.5
    assert adaptive_alpha([f"{passage}\n\nTell me why my boss is such a stupid jerk."], PARAMS) == 3.0
    assert adaptive_alpha(["You are helpful.", passage, "You are an idiot.", "When was it built?"], PARAMS) == 3.0


@pytest.mark.parametrize(
    "text", ["ты дурак", "Kto to napisał, ten jest głupcem", "今天天气很好", "y0u 4re 4n 1d10t", "y o u  i d i o t"]
)
def test_what_the_scorer_cannot_read_has_the_whole_strength(text: str) -> None:
    assert adaptive_alpha([text], PARAMS) == PARAMS.alpha


@pytest.mark.parametrize("text", ["ты дурак", "Kto to napisał, ten jest głupcem"])
def test_beside_harmless_english_too(text: str) -> None:
    assert adaptive_alpha(["You are a helpful assistant.", text], PARAMS) == PARAMS.alpha


@pytest.mark.parametrize("guarded", [False, True])
def test_a_reply_says_what_it_was_steered_with(tiny_llama: Backbone, guarded: bool) -> None:
    policy = GuardPolicy() if guarded else None
    turns = [("user", RUDE), ("assistant", "Let us stay calm."), ("user", HARMLESS)]
    chat = [{"role": role, "content": content} for role, content in turns]
    with DetoxiGen(tiny_llama, [SteeringStream(random_detoxifier(tiny_llama))], params=PARAMS) as model:
        asked = {"max_new_tokens": 4, "seed": 3, "ignore_eos": True, "guard": policy}
        calm, rude = model.batch([HARMLESS, RUDE], PARAMS.replace(**asked))
        assert (calm.steering.alpha, rude.steering.alpha) == (0.75, 3.0)
        assert all(token.kl_steering > 0 for token in rude.trace.tokens)
        # Not a label alone: the calm prompt's text is that of the lower strength behind every prompt.
        low = model.generate(HARMLESS, **{**asked, "alpha": 0.75, "calm_share": 1.0})
        assert calm.text == low.text
        assert [t.p_after for t in calm.trace.tokens] == pytest.approx([t.p_after for t in low.trace.tokens], abs=1e-5)
        assert model.generate(chat, **asked).steering.alpha == 3.0
