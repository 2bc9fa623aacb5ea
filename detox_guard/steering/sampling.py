"""What a request may say of how its tokens are chosen, and nucleus, top-k, repetition penalty and the per-request
counter RNG as pure tensor functions. Knows no contrast."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Nucleus", "Sampling", "nucleus", "penalize_repetition", "race", "uniforms"]

_NATS_BELOW = (9.0, 18.0, 0.0)
"""How far below the best token candidates are looked for, one after the other; 0 is no bound."""
_BITS = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are chosen. `settings.DecodingParams` says what each of these means, and its bounds."""

    alpha: float
    rule: str
    plausibility: float
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float

    @classmethod
    def of(cls, settings: object) -> Self:
        """From anything that has these attributes."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


class Nucleus(NamedTuple):
    """The candidates of one step."""

    ids: NDArray[np.int64]
    """`[K]` token ids, rising."""
    log_p: NDArray[np.float64]
    """`[K]` their log-probabilities over the full vocabulary."""


def nucleus(log_p: NDArray[np.float32], top_p: float, top_k: int) -> Nucleus:
    """The smallest set of most probable tokens with mass `≥ top_p` (Holtzman et al. 2020), then its `top_k` best (0 =
    all). `log_p [V]` normalised. Of tokens that are equally probable those with the lower ids come first. At least one.

    Most tokens are far less probable than the best, so only those within a few nats of it are looked at, unless they do
    not make up the mass; and none is sorted with its id: the value of the last one inside tells which are inside.
    """
    best = log_p.max()
    for within in _NATS_BELOW:
        ids = np.flatnonzero(log_p >= best - within) if within else np.flatnonzero(log_p > -np.inf)
        some = log_p[ids].astype(np.float64)
        if not within and top_p >= 1 and not 0 < top_k < len(ids):
            return Nucleus(ids, some)
        ordered = np.sort(some)[::-1]
        mass = np.exp(ordered).cumsum()
        inside = len(ids) if top_p >= 1 else 1 + int(mass.searchsorted(top_p))
        count = min(inside, top_k or inside)
        if count <= len(ids) and (top_p < 1 or 0 < top_k <= len(ids)):
            break
    count = min(count, len(ids))
    last = ordered[count - 1]
    keep = some > last
    keep[np.flatnonzero(some == last)[: count - int(keep.sum())]] = True
    return Nucleus(ids[keep], some[keep])


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> None:
    """Divide positive and multiply negative logits of the `seen` ids by `penalty`, in place (Keskar et al. 2019).

    `logits [..., V]`, `seen [M]` unique token ids.
    """
    at = logits[..., seen]
    logits[..., seen] = torch.where(at < 0, at * penalty, at / penalty)


def uniforms(seed: int, step: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniforms in (0, 1) `[K]`, a pure function of `(seed, step, ids[k])`: splitmix64 twice.

    Counter-based, so a draw depends on its own request alone: not on neighbours, nor on how many draws came before.
    """
    key = np.uint64(int(_mix(np.array([(seed + _GOLDEN * (step + 1)) & _BITS], dtype=np.uint64))[0]))
    bits = _mix(key + np.uint64(_GOLDEN) * (ids.astype(np.uint64) + np.uint64(1)))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def race(p: NDArray[np.float64], u: NDArray[np.float64]) -> int:
    """Index drawn from `p [K]` by the exponential race `argmin -log(u)/p`; never one of probability zero.

    One uniform a token (not one for all) makes the draw insensitive to the order and number of candidates.
    """
    with np.errstate(divide="ignore"):
        return int(np.argmin(-np.log(u) / p))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))
