"""Nucleus, top-k, repetition penalty the per-request counter RNG: pure tensor functions. Knows no contrast."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["Nucleus", "nuclei", "nucleus", "penalize_repetition", "race", "uniforms"]

_WIDTHS = (256, 1024, 4096)
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


class Nucleus(NamedTuple):
    """The candidates of one step."""

    ids: Tensor
    """`[N, K]` int64 token ids; one row holds each id at most once."""
    log_p: Tensor
    """`[N, K]` their log-probabilities over the full vocabulary."""
    keep: Tensor
    """`[N, K]` bool: in the nucleus, and possible at all (`log_p` above -inf). At least one a row."""


def nucleus(log_p: Tensor, top_p: Tensor, top_k: Tensor) -> Nucleus:
    """The smallest set of most probable tokens with mass `≥ top_p` (Holtzman et al. 2020), then its `top_k` best.

    `log_p [N, V]` normalised log-probabilities; `top_p [N]` in (0, 1]; `top_k [N]` int64, 0 = off. K is as small as
    covers the widest of the rows; `nuclei` gives each row a K of its own.
    """
    for width in _widths(log_p.shape[-1]):
        found, covered = _best(log_p, top_p, top_k, width)
        if bool(covered.all()):
            return found
    raise AssertionError("unreachable: the full vocabulary covers every nucleus")


def nuclei(log_p: Tensor, top_p: Tensor, top_k: Tensor) -> Iterator[tuple[Tensor, Nucleus]]:
    """`nucleus`, in groups of rows that are about equally wide: `(places [M] of the rows, their nucleus)`.

    One flat distribution in a batch so does not make its neighbours' step as expensive as its own.
    """
    waiting = torch.arange(len(log_p), device=log_p.device)
    for width in _widths(log_p.shape[-1]):
        some = (log_p, top_p, top_k) if len(waiting) == len(log_p) else (log_p[waiting], top_p[waiting], top_k[waiting])
        found, covered = _best(*some, width)
        if bool(covered.all()):
            yield waiting, found
            return
        if bool(covered.any()):
            yield waiting[covered], Nucleus(*(part[covered] for part in found))
            waiting = waiting[~covered]


def _widths(vocab: int) -> tuple[int, ...]:
    return (*(w for w in _WIDTHS if w < vocab), vocab)


def _best(log_p: Tensor, top_p: Tensor, top_k: Tensor, width: int) -> tuple[Nucleus, Tensor]:
    """The nucleus within the `width` best, and `[N]` bool: nothing of it can lie further down."""
    vocab = log_p.shape[-1]
    k_bound = torch.where(top_k > 0, top_k, vocab)
    everything = (top_p >= 1) & (k_bound >= vocab)
    if width == vocab and bool(everything.all()):
        ids = torch.arange(vocab, device=log_p.device).expand(log_p.shape)
        return Nucleus(ids, log_p, log_p > -torch.inf), everything
    best, ids = log_p.topk(width, dim=-1)
    before = best.exp().cumsum(-1) - best.exp()
    rank = torch.arange(width, device=log_p.device)
    open_p = (before < top_p.unsqueeze(-1)) | (top_p >= 1).unsqueeze(-1)
    keep = open_p & (rank < k_bound.unsqueeze(-1))
    keep[:, 0] = True
    keep &= best > -torch.inf
    # Covered when the last candidate is already outside: then nothing further can be inside.
    return Nucleus(ids, best, keep), ~keep[:, -1] | (width == vocab)


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
