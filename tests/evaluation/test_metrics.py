"""Figures against hand-computed ones."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tiny import SENTENCES

from detox_guard.evaluation.lms import reply_nll
from detox_guard.evaluation.metrics import Bootstrap, Interval, distinct_n, junk, repeats, toxicity
from detox_guard.evaluation.tables import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.models.backbone import Backbone


def test_toxicity_figures_by_hand() -> None:
    scores = np.array([[0.1, 0.9], [0.2, 0.4], [0.5, 0.1], [0.0, 0.0]])
    plain = np.array([[0.8, 0.9], [0.6, 0.4], [0.5, 0.1], [0.4, 0.4]])
    bootstrap = Bootstrap(4)
    own, other = toxicity(scores, bootstrap), toxicity(plain, bootstrap)
    wanted = {"expected_max": 1.8 / 4, "probability": 2 / 4, "share": 2 / 8, "mean": 2.2 / 8}  # .5 itself counts
    assert {name: bootstrap.figure(found).value.value for name, found in own.items()} == pytest.approx(wanted)
    figure = bootstrap.figure(own["expected_max"], other["expected_max"])
    assert figure.ratio is not None
    assert figure.ratio.value == pytest.approx(1.8 / 2.4)
    assert figure.difference is not None
    assert figure.difference.value == pytest.approx((1.8 - 2.4) / 4)
    assert bootstrap.figure(other["mean"]).ratio is None


def test_bootstrap_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        bootstrap = Bootstrap(60, seed=trial, resamples=400)
        interval = bootstrap.figure(bootstrap.rate(rng.beta(2, 5, size=60))).value
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 2 / 7 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_pairs_prompts_and_repeats() -> None:
    plain = np.random.default_rng(2).uniform(0.1, 1.0, 50)
    bootstrap = Bootstrap(50, seed=3)
    # the same cut on every prompt: no spread at all
    ratio = bootstrap.figure(bootstrap.rate(plain * 0.6), bootstrap.rate(plain)).ratio
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.6, 0.6, 0.6))
    assert np.array_equal(bootstrap.rate(plain), Bootstrap(50, seed=3).rate(plain))
    assert not np.array_equal(bootstrap.rate(plain), Bootstrap(50, seed=4).rate(plain))


def test_figures_without_a_denominator_are_undefined() -> None:
    bootstrap = Bootstrap(3)
    nothing = bootstrap.figure(bootstrap.rate([0.1, 0.2, 0.3]), bootstrap.rate([0.0, 0.0, 0.0])).ratio
    assert nothing is not None
    assert (nothing.value, nothing.low, nothing.high) == (None, None, None)
    assert bootstrap.figure(bootstrap.rate([0.0] * 3, [0.0] * 3)).value.value is None


def test_a_bound_that_resamples_do_not_give_is_none() -> None:
    bootstrap = Bootstrap(40)

    def ratio(own: int, plain: int) -> Interval:
        """Of two rates, each of the first so many of 40 prompts."""
        rates = [bootstrap.rate(np.arange(40) < count) for count in (own, plain)]
        found = bootstrap.figure(*rates).ratio
        assert found is not None
        return found

    for own, plain, low, high in (
        (5, 2, 1.0, None),  # one resample in nine divides by zero
        (1, 1, None, None),  # one in three is zero by zero, which may be anything
        (0, 1, None, None),
        (0, 20, 0.0, 0.0),
    ):
        assert ratio(own, plain) == Interval(own / plain, low, high)
    assert shown(asdict(ratio(5, 2)), change=True) == "+150% [+0%, –]"


@pytest.mark.parametrize(
    ("text", "token_ids", "wanted"),
    [
        ("A quiet walk in the park.", range(7), False),
        ("la la la la la", [5, 5, 5, 5, 5], True),
        ("la la la la", [5, 5, 5, 5], False),
        ("on and on and on and on and on and", [1, 2, 1, 2, 1, 2, 1, 2, 1, 2], True),
        ("}{;;<|>?/)(_-", range(8), True),
        ("half a char \ufffd", range(4), True),
        ("今天天气很好，我们去公园散步吧。", range(9), False),
        ("नमस्ते दुनिया", range(9), False),
        ("!!!", range(2), False),
        ("", [], False),
    ],
)
def test_broken_text(text: str, token_ids: Sequence[int], wanted: bool) -> None:
    assert (repeats(token_ids) or junk(text)) is wanted


@pytest.mark.parametrize(
    ("texts", "n", "wanted"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),
        (["a b", "a b"], 2, 1 / 2),
        (["a b c", ""], 3, 1.0),
        (["a", ""], 2, None),
        ([], 1, None),
    ],
)
def test_distinct_n(texts: list[str], n: int, wanted: float | None) -> None:
    assert distinct_n(texts, n) == wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nll_is_the_models_own_loss(kind: str, request: pytest.FixtureRequest) -> None:
    backbone: Backbone = request.getfixturevalue(f"tiny_{kind}")
    prompt = backbone.tokenizer(SENTENCES[0])["input_ids"]
    replies = [backbone.tokenizer(text)["input_ids"] for text in SENTENCES[1:4]]
    nats = reply_nll(backbone, prompt, [*replies, []])
    assert nats[-1] == 0.0
    for reply, ours in zip(replies, nats, strict=False):
        ids = torch.tensor([prompt + reply])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            loss = backbone.model(input_ids=ids, labels=labels).loss
        assert math.exp(ours / len(reply)) == pytest.approx(math.exp(float(loss)), rel=1e-4)
