"""The combining rules by themselves; that decoding follows them is checked against the oracle in `tests/engine`."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from detox_guard.steering.contrast import NATS, RULES, bounded, detoxigen, dexperts, kl_divergence, plausible, softmax

Floats = NDArray[np.float64]
WEIGHTS = np.array([-1.0])


def views(width: int, apart: float, seed: int = 0) -> tuple[Floats, Floats]:
    """Log-probabilities of a generator `[K]` and of one detoxifier `[1, K]`, at two thirds of a vocabulary."""
    made = np.random.default_rng(seed)
    gen = np.log(softmax(made.normal(size=width + width // 2) * 3))
    detox = np.log(softmax(gen + made.normal(size=gen.size) * apart))
    return gen[:width], detox[None, :width]


def moved(p: Floats, gen: Floats) -> float:
    with np.errstate(divide="ignore"):
        return kl_divergence(np.log(p), np.log(softmax(gen)))


@pytest.mark.parametrize("apart", [0.02, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("width", [1, 2, 40, 400])
@pytest.mark.parametrize("alpha", [0.1, 3.0, 50.0])
def test_bounded_moves_no_token_further_and_wastes_no_strength(apart: float, width: int, alpha: float) -> None:
    held = 0
    for seed in range(50):
        gen, detox = views(width, apart, seed)
        p = bounded(gen, detox, WEIGHTS, alpha).p
        assert p.sum() == pytest.approx(1)
        kl = moved(p, gen)
        assert kl <= NATS * alpha * (1 + 1e-5) + 1e-9
        whole = dexperts(gen, detox, WEIGHTS, alpha).p
        if moved(whole, gen) <= NATS * alpha:
            np.testing.assert_allclose(p, whole, rtol=1e-9, atol=1e-300)  # where there is room, all of it
        else:
            held += 1
            assert kl >= NATS * alpha * (1 - 1e-4)  # elsewhere, to the bound
    if width == 400 and apart == 3.0 and alpha < 50:
        assert held


@pytest.mark.parametrize("rule", RULES)
def test_no_strength_is_the_generator_on_its_nucleus(rule: str) -> None:
    gen, detox = views(40, 2.0)
    np.testing.assert_allclose(RULES[rule](gen, detox, WEIGHTS, 0.0).p, softmax(gen), rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 3.0, 50.0])
def test_the_papers_rule_is_its_formula(alpha: float) -> None:
    gen, detox = views(40, 2.0)
    score = np.maximum(np.exp(gen) + alpha * (np.exp(gen) - np.exp(detox[0])), 0)
    mixed = detoxigen(gen, detox, WEIGHTS, alpha)
    np.testing.assert_allclose(mixed.p, score / score.sum(), rtol=1e-9)
    assert mixed.clipped_mass == pytest.approx(np.exp(gen)[score == 0].sum() / np.exp(gen).sum())
    assert not mixed.fallback


def test_where_all_is_clipped_the_least_toxic_is_certain() -> None:
    gen, detox = np.log([0.3, 0.2]), np.log([[0.6, 0.3]])
    mixed = detoxigen(gen, detox, WEIGHTS, 50.0)
    assert mixed.fallback
    assert mixed.p.tolist() == [0.0, 1.0]  # .2/.3 is more than .3/.6
    assert mixed.clipped_mass == 1


def test_an_expert_beside_a_detoxifier() -> None:
    gen, detox = views(40, 1.0)
    _, expert = views(40, 1.0, seed=3)
    both = dexperts(gen, np.concatenate([detox, expert]), np.array([-1.0, 2.0]), 1.5).p
    np.testing.assert_allclose(both, softmax(gen + 1.5 * (-(detox[0] - gen) + 2 * (expert[0] - gen))), rtol=1e-9)


def test_the_plausibility_floor() -> None:
    gen = np.log([0.5, 0.3, 0.05, 0.04])
    assert plausible(gen, 0.1).tolist() == [True, True, True, False]
    assert plausible(gen, 0.0).all()


def test_divergence_of_what_is_impossible() -> None:
    with np.errstate(divide="ignore"):
        p, q = np.log([0.5, 0.5, 0.0]), np.log([0.25, 0.75, 0.0])
    assert kl_divergence(p, q) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
