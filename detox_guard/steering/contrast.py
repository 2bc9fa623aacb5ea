"""The combining rules: pure tensor functions over the generator's nucleus. Knows no model, no state, no sampling.

Shapes: `rows` N, steering streams S, candidates K. `log_gen [N, K]` and `log_streams [N, S, K]` are log-probabilities
over the *full* vocabulary after temperature, gathered at the K candidates; `keep [N, K]` marks the candidates that lie
in the generator's nucleus; `weights [S]` are signed (a detoxifier is -1, an expert +1); `alpha [N]`.

Every rule moves along one direction, `d = Σ_i w_i·(x_i - x_gen)`, in the space that is its own. With the paper's one
negative stream that is `x_gen - x_detox`. `alpha = 0` gives the generator renormalised on its nucleus, in every rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["NATS", "RULES", "Mixed", "bounded", "detoxigen", "dexperts", "kl_divergence", "plausible"]

NATS = 0.4
"""`bounded`: the most nats, per unit of alpha, by which a token's distribution may move."""
_SEARCH_STEPS = 14


class Mixed(NamedTuple):
    """What a rule made of one step."""

    p: Tensor
    """`[N, K]` probabilities to sample from; each row sums to 1, zero outside the nucleus."""
    clipped_mass: Tensor
    """`[N]` share of the generator's nucleus mass that the rule set to zero."""
    fallback: Tensor
    """`[N]` bool: the whole nucleus was clipped, and the least toxic candidate was taken."""


def detoxigen(log_gen: Tensor, log_streams: Tensor, weights: Tensor, alpha: Tensor, keep: Tensor) -> Mixed:
    """DetoxiGen (arXiv 2401.06947, section on contrastive decoding): `p ∝ max(0, p_gen + α·(p_gen - p_detox))`.

    A token survives iff `p_gen/p_detox > α/(1+α)`. If none does, the one with the largest `p_gen/p_detox` is certain.
    """
    p_gen = log_gen.exp() * keep
    direction = torch.einsum("s,nsk->nk", weights, log_streams.exp() - log_gen.exp().unsqueeze(1))
    score = (p_gen + alpha.unsqueeze(-1) * direction).clamp_min(0) * keep
    total = score.sum(-1, keepdim=True)
    fallback = total.squeeze(-1) <= 0
    ratio = _log_direction(log_gen, log_streams, weights).masked_fill(~keep, -torch.inf)
    certain = torch.zeros_like(score).scatter_(-1, ratio.argmax(-1, keepdim=True), 1.0)
    p = torch.where(fallback.unsqueeze(-1), certain, score / total.clamp_min(torch.finfo(score.dtype).tiny))
    clipped = (p_gen * (score <= 0)).sum(-1) / p_gen.sum(-1)
    return Mixed(p, clipped, fallback)


def dexperts(log_gen: Tensor, log_streams: Tensor, weights: Tensor, alpha: Tensor, keep: Tensor) -> Mixed:
    """DExperts (Liu et al. 2021, eq. 1): `log p = log p_gen + α·Σ w_i·(log p_i - log p_gen) + const` on the nucleus.

    With one negative stream this is their anti-expert-only form. It reweighs and never clips.
    """
    return _reweighed(log_gen, _log_direction(log_gen, log_streams, weights), alpha, keep)


def bounded(log_gen: Tensor, log_streams: Tensor, weights: Tensor, alpha: Tensor, keep: Tensor) -> Mixed:
    """`dexperts` with a strength of its own at each token (ours): the largest `a ≤ α` that moves the nucleus by no more
    than `KL(p‖p_gen) = NATS·α`.

    Where the rows differ in all they say, as at the first tokens of a reply, the whole strength would tear the text
    apart, so it is lowered there. Where the detoxifier says next to nothing, as along harmless text, next to nothing
    is moved: more strength would spend the same nats there on noise.
    """
    direction = _log_direction(log_gen, log_streams, weights)
    return _reweighed(log_gen, direction, _strength(log_gen, direction, alpha, keep), keep)


def plausible(log_gen: Tensor, beta: Tensor) -> Tensor:
    """`[N, K]` bool: the adaptive plausibility floor `p_gen ≥ β·max p_gen` (Li et al. 2023). `beta [N]`, 0 = off."""
    floor = log_gen.amax(-1, keepdim=True) + beta.clamp_min(torch.finfo(beta.dtype).tiny).log().unsqueeze(-1)
    return (log_gen >= floor) | (beta <= 0).unsqueeze(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p‖q)` in nats over the last axis; terms where p is zero count as zero."""
    p = log_p.exp()
    divergence: Tensor = torch.linalg.vecdot(p, log_p - log_q)
    if bool(divergence.isfinite().all()):
        return divergence
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros((), dtype=p.dtype, device=p.device)).sum(-1)


def _reweighed(log_gen: Tensor, direction: Tensor, alpha: Tensor, keep: Tensor) -> Mixed:
    """`log p = log p_gen + α·direction + const` on the nucleus."""
    p = (log_gen + alpha.unsqueeze(-1) * direction).masked_fill(~keep, -torch.inf).softmax(-1)
    return Mixed(p, torch.zeros_like(alpha), torch.zeros_like(alpha, dtype=torch.bool))


def _strength(log_gen: Tensor, direction: Tensor, most: Tensor, keep: Tensor) -> Tensor:
    """`[N]`: the largest strength of `_reweighed` up to `most` whose KL to the generator is at most `NATS·most`.

    In float64, and each row as if it were alone. Few rows need the search: those that `most` itself moves too far.
    """
    log_gen = log_gen.double().masked_fill(~keep, -torch.inf).log_softmax(-1)
    direction = direction.double().masked_fill(~keep, 0)
    strength = most.to(torch.float64, copy=True)
    nats = NATS * strength
    moved, _ = _movement(log_gen, direction, strength)
    far = (moved > nats).nonzero().squeeze(-1)
    if len(far):
        strength[far] = _search(log_gen[far], direction[far], strength[far], nats[far])
    return strength.to(torch.float32)


def _movement(log_gen: Tensor, direction: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """`KL(p‖p_gen)` `[N]` at the strengths `a`, and how fast it grows with them: `a·Var(direction)`. `log_gen` is
    normalised."""
    log_p = log_gen + a.unsqueeze(-1) * direction
    norm = log_p.logsumexp(-1)
    p = (log_p - norm.unsqueeze(-1)).exp()
    mean = (p * direction).sum(-1)
    variance = (p * (direction - mean.unsqueeze(-1)).square()).sum(-1)
    return a * mean - norm, a * variance


def _search(log_gen: Tensor, direction: Tensor, most: Tensor, nats: Tensor) -> Tensor:
    """The strengths under `most` that move by `nats`: Newton's steps, halved where they leave what is left."""
    low, high, a = torch.zeros_like(most), most, most
    for _ in range(_SEARCH_STEPS):
        moved, rate = _movement(log_gen, direction, a)
        over = moved > nats
        low, high = torch.where(over, low, a), torch.where(over, a, high)
        step = a - (moved - nats) / rate
        a = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
    return a


def _log_direction(log_gen: Tensor, log_streams: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("s,nsk->nk", weights, log_streams - log_gen.unsqueeze(1))


RULES: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Mixed]] = {
    "bounded": bounded,
    "dexperts": dexperts,
    "detoxigen": detoxigen,
}
