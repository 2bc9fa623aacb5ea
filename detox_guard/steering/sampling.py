"""What a request may say of how its tokens are chosen, and nucleus, top-k, repetition penalty and the per-request
counter RNG as pure tensor functions. Knows no contrast."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["Nucleus", "Sampling", "nuclei", "penalize_repetition", "race", "uniforms"]

_WIDTHS = (256, 1024, 4096)
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


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

    ids: Tensor
    """`[N, K]` int64 token ids; one row holds each id at most once."""
    log_p: Tensor
    """`[N, K]` their log-probabilities over the full vocabulary."""
    keep: Tensor
    """`[N, K]` bool: in the nucleus, and possible at all (`log_p` above -inf). At least one a row."""


def nuclei(log_p: Tensor, top_p: Tensor, top_k: Tensor) -> Iterator[tuple[Tensor, Nucleus]]:
    """The smallest set of most probable tokens with mass `≥ top_p` (Holtzman et al. 2020), then its `top_k` best.

    `log_p [N, V]` normalised log-probabilities; `top_p [N]` in (0, 1]; `top_k [N]` int64, 0 = off. In groups of rows
    that are about equally wide, `(places [M] of the rows, their nucleus)`, so that one flat distribution in a batch
    does not make its neighbours' step as expensive as its own; each group sorts as few candidates as cover it.
    """
    vocab = log_p.shape[-1]
    k_bound = torch.where(top_k > 0, top_k, vocab)
    everything = (top_p >= 1) & (k_bound >= vocab)  # nothing to sort
    if bool(everything.any()):
        places = everything.nonzero().squeeze(-1)
        some = _at(log_p, places)
        yield places, Nucleus(torch.arange(vocab, device=log_p.device).expand(some.shape), some, some > -torch.inf)
    waiting = (~everything).nonzero().squeeze(-1)
    for width in (*(w for w in _WIDTHS if w < vocab), vocab):
        if not len(waiting):
            return
        best, ids = _at(log_p, waiting).topk(width, dim=-1)
        before = best.exp().cumsum(-1) - best.exp()
        rank = torch.arange(width, device=log_p.device)
        open_p = (before < top_p[waiting].unsqueeze(-1)) | (top_p[waiting] >= 1).unsqueeze(-1)
        keep = open_p & (rank < k_bound[waiting].unsqueeze(-1))
        keep[:, 0] = True
        keep &= best > -torch.inf
        # Covered when the last candidate is already outside: then nothing further can be inside.
        covered = ~keep[:, -1] | (width == vocab)
        if bool(covered.any()):
            yield waiting[covered], Nucleus(*(_at(part, covered.nonzero().squeeze(-1)) for part in (ids, best, keep)))
        waiting = waiting[~covered]


def _at(rows: Tensor, places: Tensor) -> Tensor:
    """The rows at these places, in order; not copied where that is all of them."""
    return rows if len(places) == len(rows) else rows[places]


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> None:
    """Divide positive and multiply negative logits of the `seen` ids by `penalty`, in place (Keskar et al. 2019).

    `logits [..., V]`, `seen [M]` unique token ids.
    """
    at = logits[..., seen]
    logits[..., seen] = torch.where(at < 0, at * penalty, at / penalty)


def uniforms(seed: Tensor, step: Tensor, ids: Tensor) -> Tensor:
    """Uniforms in (0, 1), float64 `[N, K]`, a pure function of `(seed[n], step[n], ids[n, k])`: splitmix64 twice.

    Counter-based, so a draw depends on its own request alone: not on neighbours, nor on how many draws came before.
    """
    row_key = _mix(seed + _GOLDEN * (step + 1))
    bits = _mix(row_key.unsqueeze(-1) + _GOLDEN * (ids + 1))
    return (_shift_right(bits, 11).to(torch.float64) + 0.5) * 2.0**-53


def race(p: Tensor, u: Tensor) -> Tensor:
    """`[N]` index drawn from `p [N, K]` by the exponential race `argmin -log(u)/p`; never one of probability zero.

    One uniform a token (not one a row) makes the draw insensitive to the order and number of candidates.
    """
    arrival = (-u.log()).log() - p.to(torch.float64).log()
    return arrival.argmin(-1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
