"""Candidates and draws. The nucleus is held to a plain sort, the draw to the distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detox_guard.steering.contrast import softmax
from detox_guard.steering.sampling import nucleus, race, uniforms


def sorted_nucleus(log_p: np.ndarray, top_p: float, top_k: int) -> set[int]:
    """By sorting all of it: equal ones by their ids."""
    order = np.argsort(-log_p, kind="stable")
    order = order[log_p[order] > -np.inf]
    p = np.exp(log_p[order].astype(np.float64))
    before = p.cumsum() - p
    inside = order if top_p >= 1 else order[before < top_p]
    return set((inside[:top_k] if top_k else inside).tolist())


@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 7, 200, 5000]),
    vocab=st.sampled_from([1, 3, 300, 3000]),
    barred=st.booleans(),
)
def test_nucleus_is_that_of_a_sort(
    seed: int, spread: float, top_p: float, top_k: int, vocab: int, barred: bool
) -> None:
    made = np.random.default_rng(seed)
    logits = np.round(made.normal(size=vocab) * spread, 1)  # rounded: some are equal
    if barred:
        logits[made.random(vocab) < 0.5] = -np.inf
        logits[made.integers(vocab)] = 0.0
    with np.errstate(divide="ignore"):
        log_p = np.log(softmax(logits)).astype(np.float32)
    ids, values = nucleus(log_p, top_p, top_k)
    found, wanted = set(ids.tolist()), sorted_nucleus(log_p, top_p, top_k)
    # At the edge the last bit of a sum decides; what lies there makes no difference to the mass.
    edge = np.exp(log_p[sorted(found ^ wanted)].astype(np.float64)).sum()
    assert edge < 1e-6 or len(found ^ wanted) == 1
    assert (np.diff(ids) > 0).all()
    assert values.tolist() == log_p[ids].astype(np.float64).tolist()
    assert len(ids) >= 1


def test_a_draw_depends_on_seed_step_and_token_alone() -> None:
    some = uniforms(7, 3, np.array([5, 900, 49_000]))
    assert some.tolist() == [float(uniforms(7, 3, np.array([i]))[0]) for i in (5, 900, 49_000)]
    others = [uniforms(seed, step, np.array([5]))[0] for seed, step in ((8, 3), (7, 4), (2**63 - 1, 3))]
    assert len({float(some[0]), *map(float, others)}) == 4
    assert all(0 < u < 1 for u in (*some, *others))


def test_draws_follow_the_distribution() -> None:
    p = np.array([0.5, 0.25, 0.0, 0.2, 0.05])
    ids = np.array([3, 10, 11, 500, 40_000])
    counts = np.bincount([race(p, uniforms(seed, 0, ids)) for seed in range(20_000)], minlength=5)
    assert counts[2] == 0
    expected = 20_000 * p[p > 0]
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 16.3  # three degrees of freedom, one in a thousand


@pytest.mark.parametrize("index", [0, 2])
def test_what_is_certain_is_drawn(index: int) -> None:
    p = np.zeros(3)
    p[index] = 1.0
    assert {race(p, uniforms(seed, 1, np.arange(3))) for seed in range(50)} == {index}
