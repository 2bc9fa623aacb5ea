"""The combining rules by themselves; that decoding follows them is checked against the oracle in `tests/engine`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detox_guard.steering.contrast import NATS, RULES, bounded, dexperts, kl_divergence

WEIGHTS = torch.tensor([-1.0])


def views(rows: int, width: int, apart: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of a generator and of one detoxifier, and a nucleus of about two thirds."""
    made = torch.Generator().manual_seed(seed)
    gen = (torch.randn(rows, width, generator=made) * 3).log_softmax(-1)
    detox = (gen + torch.randn(rows, width, generator=made) * apart).log_softmax(-1)
    keep = torch.rand(rows, width, generator=made) < 0.67
    keep[:, 0] = True
    return gen, detox.unsqueeze(1), keep


def moved(p: Tensor, gen: Tensor, keep: Tensor) -> Tensor:
    own = gen.double().masked_fill(~keep, -torch.inf).log_softmax(-1)
    return kl_divergence(p.double().log(), own)


@pytest.mark.parametrize("apart", [0.02, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("width", [1, 2, 40, 400])
@pytest.mark.parametrize("alpha", [0.1, 3.0, 50.0])
def test_bounded_moves_no_token_further_and_wastes_no_strength(apart: float, width: int, alpha: float) -> None:
    gen, detox, keep = views(200, width, apart)
    strength = torch.full((200,), alpha)
    p = bounded(gen, detox, WEIGHTS, strength, keep).p
    kl = moved(p, gen, keep)
    assert kl.max() <= NATS * alpha + 1e-5 * max(1.0, alpha)
    whole = dexperts(gen, detox, WEIGHTS, strength, keep).p
    held = moved(whole, gen, keep) > NATS * alpha + 1e-5
    torch.testing.assert_close(p[~held], whole[~held], rtol=1e-4, atol=1e-6)  # where there is room, all of it
    assert bool((kl[held] >= NATS * alpha - 1e-4 * max(1.0, alpha)).all())  # elsewhere, to the bound


def test_bounded_rows_do_not_depend_on_their_neighbours() -> None:
    gen, detox, keep = views(6, 40, 2.0)
    alpha = torch.tensor([0.0, 0.5, 1.0, 3.0, 9.0, 100.0])
    together = bounded(gen, detox, WEIGHTS, alpha, keep).p
    for i in range(6):
        row = slice(i, i + 1)
        alone = bounded(gen[row], detox[row], WEIGHTS, alpha[row], keep[row]).p
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_no_strength_is_the_generator_on_its_nucleus(rule: str) -> None:
    gen, detox, keep = views(20, 40, 2.0)
    p = RULES[rule](gen, detox, WEIGHTS, torch.zeros(20), keep).p
    torch.testing.assert_close(p, gen.masked_fill(~keep, -torch.inf).softmax(-1), rtol=1e-5, atol=1e-7)
