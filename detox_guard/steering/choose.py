"""One decoding decision for many requests at once: logits in, one `TokenStep` a request out. Knows no cache, no model.

Order of operations, for every request on its own parameters: constraint, bans and repetition penalty (all its streams
alike), temperature, the generator's nucleus, the plausibility floor, the contrast, the draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from detox_guard.errors import StepError
from detox_guard.steering.contrast import RULES, Mixed, kl_divergence, plausible, softmax
from detox_guard.steering.sampling import Sampling, nucleus, penalize_repetition, race, uniforms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["COLDEST", "Chooser", "TokenStep", "Turn"]

COLDEST = 1e-6
"""The lowest temperature that is told from others: logits over a lower one would leave float32's range."""


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One emitted token and the figures of the step that chose it. Probabilities are within the generator's nucleus."""

    index: int
    """Place in the reply, from 0."""
    token_id: int
    p_before: float
    """What plain sampling would have given this token."""
    p_after: float
    """What the contrast gave it."""
    kl_detoxifier: float
    """`KL(p_gen‖p_detox)` over the vocabulary, nats; of the first negative stream (0 for a plain step)."""
    kl_steering: float
    """`KL(p‖p_gen)` within the nucleus, nats: how hard this step was steered."""
    clipped_mass: float
    """Share of the nucleus mass set to zero."""
    fallback: bool
    """Everything was clipped; the least toxic candidate was taken."""
    preferred_id: int
    """The generator's own most probable token…"""
    preferred_p: float
    """…and its probability before."""
    steered: bool
    """A whole set of stream rows took part in this step."""
    distribution: tuple[Tensor, Tensor] | None = None
    """`(ids [K], p [K])`, only where the request asked for it (`keep_distributions`)."""


@dataclass(frozen=True)
class Turn:
    """What one request brings to a step."""

    sampling: Sampling
    seed: int
    index: int
    """Place of the token to choose in the reply; also the RNG's counter."""
    rows: Sequence[int]
    """Rows of the logits: the generator's, then one a stream; the generator's alone if it is plain."""
    seen: Tensor | None
    """Unique ids of prompt and reply, where a repetition penalty asks for them."""
    banned: frozenset[int] = frozenset()
    """Ids that may not be chosen, whatever any stream says."""
    keep_distribution: bool = False
    allowed: Tensor | None = None
    """`[vocab]` bool: the tokens that its constraint leaves; all its streams live in them."""

    @property
    def steered(self) -> bool:
        return self.sampling.alpha > 0


class Chooser:
    """Chooses tokens under `weights [S]`, the signed weights of the engine's streams.

    What is as wide as the vocabulary is normalised where the logits are. The rest is done on the host, request by
    request, so that a token depends on nobody else in the batch.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = np.array(weights, dtype=np.float64)
        self._detoxifier = next((i for i, w in enumerate(weights) if w < 0), 0)

    def choose(self, logits: Tensor, turns: Sequence[Turn]) -> list[TokenStep | StepError]:
        """One token for each turn from `logits [rows, vocab]` (float32, overwritten).

        A turn whose rows hold a NaN or +inf gets a `StepError` in its place and samples nothing; the others are not
        touched by it. Raises `StepError` where a steered turn lacks rows.
        """
        for turn in turns:
            if turn.steered and len(turn.rows) != 1 + len(self.weights):
                raise StepError(f"a steered request has {len(turn.rows)} rows, {1 + len(self.weights)} are needed")
            _rule_out(logits, turn)
        first = logits[[turn.rows[0] for turn in turns]].argmax(-1).tolist()
        for turn in turns:
            if turn.sampling.temperature not in (0, 1):
                logits[list(turn.rows)] /= max(turn.sampling.temperature, COLDEST)
        log_p = logits.log_softmax(-1).cpu().numpy()
        with np.errstate(all="ignore"):
            return [self._one(turn, log_p, plain) for turn, plain in zip(turns, first, strict=True)]

    def _one(self, turn: Turn, log_p: NDArray[np.float32], plain: int) -> TokenStep | StepError:
        """`log_p [rows, vocab]`; `plain` is the generator's own best token."""
        sampling, gen = turn.sampling, log_p[turn.rows[0]]
        streams = [log_p[row] for row in turn.rows[1:]] if turn.steered else []
        # A NaN or +inf anywhere in a row makes the whole row NaN, so one column tells.
        if any(np.isnan(view[0]) for view in (gen, *streams)):
            return _nothing_to_choose(turn)
        ids, log_gen = nucleus(gen, sampling.top_p, sampling.top_k)
        before = softmax(log_gen)
        if sampling.plausibility:
            inside = plausible(log_gen, sampling.plausibility)
            ids, log_gen, before = ids[inside], log_gen[inside], before[inside]
        kl_detoxifier = 0.0
        if streams:
            kl_detoxifier = kl_divergence(gen, streams[self._detoxifier])
            log_streams = np.stack([view[ids] for view in streams]).astype(np.float64)
            mixed = RULES[sampling.rule](log_gen, log_streams, self.weights, sampling.alpha)
        else:
            mixed = Mixed(softmax(log_gen))
        p = mixed.p
        if np.isnan(p).any():
            return _nothing_to_choose(turn)
        if sampling.temperature:
            pick = race(p, uniforms(turn.seed, turn.index, ids))
        else:
            # alpha = 0 is a bypass, not a contrast of strength zero: greedy is the argmax that `model.generate` takes.
            pick = int(p.argmax() if streams else ids.searchsorted(plain))
        preferred = int(ids.searchsorted(plain))
        return TokenStep(
            index=turn.index,
            token_id=int(ids[pick]),
            p_before=float(before[pick]),
            p_after=float(p[pick]),
            kl_detoxifier=max(kl_detoxifier, 0.0),
            kl_steering=max(kl_divergence(np.log(p), np.log(before)), 0.0),
            clipped_mass=mixed.clipped_mass,
            fallback=mixed.fallback,
            preferred_id=plain,
            preferred_p=float(before[preferred]),
            steered=bool(streams),
            distribution=(torch.from_numpy(ids), torch.from_numpy(p).float()) if turn.keep_distribution else None,
        )


def _rule_out(logits: Tensor, turn: Turn) -> None:
    """Take from the turn's rows what may not be chosen, and penalise what was said, in place."""
    rows = list(turn.rows)
    if turn.banned or turn.allowed is not None:
        allowed = torch.ones(logits.shape[-1], dtype=torch.bool) if turn.allowed is None else turn.allowed
        fit = allowed.clone()
        fit[list(turn.banned)] = False
        # Where the constraint leaves nothing else, the ban yields: who banned it will see it again.
        out = ~(fit if fit.any() else allowed).to(logits.device)
        logits[rows] = logits[rows].masked_fill(out, -torch.inf)
    if turn.seen is not None:
        for row in rows:
            penalize_repetition(logits[row], turn.seen, turn.sampling.repetition_penalty)


def _nothing_to_choose(turn: Turn) -> StepError:
    if turn.allowed is not None and not turn.allowed.any():
        return StepError("the constraint allows no token", hint="simplify the grammar")
    return StepError("the backbone gave logits that are not numbers", hint="try dtype='float32'")
