"""The combining rules: pure functions over one generator's nucleus. Knows no model, no state, no sampling.

Shapes: candidates K, steering streams S. `log_gen [K]` and `log_streams [S, K]` are log-probabilities over the *full*
vocabulary after temperature, at the K candidates of the generator's nucleus; `weights [S]` are signed (a detoxifier
is -1, an expert +1). All of it is float64.

Every rule moves along one direction, `d = Σ_i w_i·(x_i - x_gen)`, in the space that is its own. With the paper's one
negative stream that is `x_gen - x_detox`. `alpha = 0` gives the generator renormalised on its nucleus, in every rule.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["NATS", "RULES", "Mixed", "bounded", "detoxigen", "dexperts", "kl_divergence", "plausible", "softmax"]

NATS = 0.4
"""`bounded`: the most nats, per unit of alpha, by which a token's distribution may move."""
_SEARCH_STEPS = 14


class Mixed(NamedTuple):
    """What a rule made of one step."""

    p: Floats
    """`[K]` probabilities to sample from; they sum to 1."""
    clipped_mass: float = 0.0
    """Share of the nucleus' mass that the rule set to zero."""
    fallback: bool = False
    """The whole nucleus was clipped, and the least toxic candidate was taken."""


def detoxigen(log_gen: Floats, log_streams: Floats, weights: Floats, alpha: float) -> Mixed:
    """DetoxiGen (arXiv 2401.06947, section on contrastive decoding): `p ∝ max(0, p_gen + α·(p_gen - p_detox))`.

    A token survives iff `p_gen/p_detox > α/(1+α)`. If none does, the one with the largest `p_gen/p_detox` is certain.
    """
    p_gen = np.exp(log_gen)
    score = np.maximum(p_gen + alpha * (_along(weights, np.exp(log_streams) - p_gen)), 0)
    total = score.sum()
    clipped = float(p_gen[score <= 0].sum() / p_gen.sum())
    if total <= 0:
        certain = np.zeros_like(score)
        certain[np.argmax(_log_direction(log_gen, log_streams, weights))] = 1.0
        return Mixed(certain, clipped, True)
    return Mixed(score / total, clipped)


def dexperts(log_gen: Floats, log_streams: Floats, weights: Floats, alpha: float) -> Mixed:
    """DExperts (Liu et al. 2021, eq. 1): `log p = log p_gen + α·Σ w_i·(log p_i - log p_gen) + const` on the nucleus.

    With one negative stream this is their anti-expert-only form. It reweighs and never clips.
    """
    return Mixed(softmax(log_gen + alpha * _log_direction(log_gen, log_streams, weights)))


def bounded(log_gen: Floats, log_streams: Floats, weights: Floats, alpha: float) -> Mixed:
    """`dexperts` with a strength of its own at each token (ours): the largest `a ≤ α` that moves the nucleus by no more
    than `KL(p‖p_gen) = NATS·α`.

    Where the rows differ in all they say, as at the first tokens of a reply, the whole strength would tear the text
    apart, so it is lowered there. Where the detoxifier says next to nothing, as along harmless text, next to nothing
    is moved: more strength would spend the same nats there on noise.
    """
    direction = _log_direction(log_gen, log_streams, weights)
    own = log_gen - _logsumexp(log_gen)
    p, moved, _ = _moved(own, direction, alpha)
    return Mixed(p if moved <= NATS * alpha else _search(own, direction, alpha, NATS * alpha))


def plausible(log_gen: Floats, beta: float) -> NDArray[np.bool_]:
    """`[K]`: the adaptive plausibility floor `p_gen ≥ β·max p_gen` (Li et al. 2023). `beta` 0 = off."""
    floor = log_gen.max() + math.log(beta) if beta > 0 else -math.inf
    return np.asarray(log_gen >= floor)


def kl_divergence(log_p: NDArray[np.floating], log_q: NDArray[np.floating]) -> float:
    """`KL(p‖q)` in nats; terms where p is zero count as zero."""
    with np.errstate(invalid="ignore"):
        divergence = _dot(np.exp(log_p), log_p - log_q)
    if math.isnan(divergence):
        some = log_p > -np.inf
        divergence = _dot(np.exp(log_p[some]), log_p[some] - log_q[some])
    return divergence


def softmax(x: Floats) -> Floats:
    """`[K]` probabilities of what is only known up to a constant."""
    p: Floats = np.exp(x - x.max())
    p /= p.sum()
    return p


def _moved(log_gen: Floats, direction: Floats, a: float) -> tuple[Floats, float, float]:
    """The distribution at strength `a`, its KL to the generator, and how fast that grows: `a·Var(direction)`."""
    log_p = log_gen + a * direction
    norm = _logsumexp(log_p)
    p = np.exp(log_p - norm)
    mean = _dot(p, direction)
    return p, a * mean - norm, a * _dot(p, np.square(direction - mean))


def _search(log_gen: Floats, direction: Floats, most: float, nats: float) -> Floats:
    """The distribution at the strength under `most` that moves by `nats`: Newton's steps, halved where they leave what
    is left."""
    low, high, a = 0.0, most, most
    for _ in range(_SEARCH_STEPS):
        p, moved, rate = _moved(log_gen, direction, a)
        if abs(moved - nats) <= 1e-6 * nats:
            return p
        low, high = (low, a) if moved > nats else (a, high)
        step = a - (moved - nats) / rate if rate > 0 else math.nan
        a = step if low <= step <= high else (low + high) / 2
    return _moved(log_gen, direction, low)[0]


def _logsumexp(x: Floats) -> float:
    top = float(x.max())
    return top + math.log(float(np.exp(x - top).sum()))


def _dot(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Not by BLAS, which shares out long sums among threads that wait for each other on a busy machine."""
    return float((x * y).sum())


def _log_direction(log_gen: Floats, log_streams: Floats, weights: Floats) -> Floats:
    return _along(weights, log_streams - log_gen)


def _along(weights: Floats, differences: Floats) -> Floats:
    direction: Floats = (weights[:, None] * differences).sum(0)
    return direction


RULES: Mapping[str, Callable[[Floats, Floats, Floats, float], Mixed]] = {
    "bounded": bounded,
    "dexperts": dexperts,
    "detoxigen": detoxigen,
}
