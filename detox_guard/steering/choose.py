"""One decoding decision for many requests at once: logits in, one `TokenStep` a request out. Knows no cache, no model.

Order of operations, for every request on its own parameters: constraint, bans and repetition penalty (all its streams
alike), temperature, the generator's nucleus, the plausibility floor, the contrast, the draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from detox_guard.errors import StepError
from detox_guard.steering.contrast import RULES, kl_divergence, plausible
from detox_guard.steering.sampling import Nucleus, Sampling, nuclei, penalize_repetition, race, uniforms

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """Chooses tokens under `weights [S]`, the signed weights of the engine's streams."""

    def __init__(self, weights: Sequence[float], device: torch.device) -> None:
        # float64 draws and KL sums do not exist on MPS; the vocabulary-wide work is small enough for the CPU there.
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.weights = torch.tensor(list(weights), dtype=torch.float32, device=self.device)
        self._detoxifier = next((i for i, w in enumerate(weights) if w < 0), 0)

    def choose(self, logits: Tensor, turns: Sequence[Turn]) -> list[TokenStep | StepError]:
        """One token for each turn from `logits [rows, vocab]` (float32, overwritten).

        A turn whose rows hold a NaN or +inf gets a `StepError` in its place and samples nothing; the others are not
        touched by it. Raises `StepError` where a steered turn lacks rows.
        """
        logits = logits.to(self.device)
        streams = len(self.weights)
        for turn in turns:
            if turn.steered and len(turn.rows) != 1 + streams:
                raise StepError(f"a steered request has {len(turn.rows)} rows, {1 + streams} are needed")
            if turn.banned or turn.allowed is not None:
                logits[list(turn.rows)] = logits[list(turn.rows)].masked_fill(_ruled_out(turn, logits), -torch.inf)
            if turn.seen is not None:
                for row in turn.rows:
                    penalize_repetition(logits[row], turn.seen, turn.sampling.repetition_penalty)
        # A plain turn reads its own generator as its streams: the direction is then exactly zero.
        rows = torch.tensor(
            [list(t.rows) if t.steered else [t.rows[0]] * (1 + streams) for t in turns], device=self.device
        )
        warmth = self._column([max(t.sampling.temperature, COLDEST) if t.sampling.temperature else 1.0 for t in turns])
        plain = logits.argmax(-1)[rows[:, 0]]
        log_p = self._warmed(logits, rows, warmth).log_softmax(-1)
        log_gen, log_streams = log_p[rows[:, 0]], log_p[rows[:, 1:]]
        # A NaN or +inf anywhere in a row makes the whole row NaN, so one column tells.
        sane = (~(log_gen[:, 0].isnan() | log_streams[:, :, 0].isnan().any(-1))).tolist()
        if not all(sane):
            log_gen = log_gen.nan_to_num(nan=-torch.inf, neginf=-torch.inf)

        top_p = self._column([t.sampling.top_p for t in turns])
        kl_detox = kl_divergence(log_gen, log_streams[:, self._detoxifier]) if streams else torch.zeros_like(top_p)
        steps: list[TokenStep | StepError | None] = [None] * len(turns)
        every = torch.arange(streams, device=self.device).unsqueeze(-1)
        for places, nuc in nuclei(log_gen, top_p, self._integers([t.sampling.top_k for t in turns])):
            at = places.tolist()
            gathered = log_streams[places.view(-1, 1, 1), every, nuc.ids.unsqueeze(1)]
            p, figures = self._decide([turns[i] for i in at], nuc, gathered, plain[places], kl_detox[places])
            for row, i in enumerate(at):
                if sane[i] and figures[row][-1]:
                    steps[i] = _token_step(turns[i], figures[row], (nuc.ids[row], p[row]))
        return [step or _nothing_to_choose(turn) for step, turn in zip(steps, turns, strict=True)]

    def _decide(
        self, turns: Sequence[Turn], nuc: Nucleus, log_streams: Tensor, plain: Tensor, kl_detox: Tensor
    ) -> tuple[Tensor, list[list[float]]]:
        """Mix and draw: the probabilities `[N, K]`, and each turn's figures in the order of `_token_step`, the last of
        them 1 if they are numbers. `log_streams [N, S, K]`; `plain [N]` ids, `kl_detox [N]` are passed on."""
        greedy = torch.tensor([t.sampling.temperature == 0 for t in turns], device=self.device)
        alpha = self._column([t.sampling.alpha for t in turns])
        keep = nuc.keep & plausible(nuc.log_p, self._column([t.sampling.plausibility for t in turns]))
        p, clipped, fallback = self._mix(turns, nuc.log_p, log_streams, alpha, keep)

        drawn = race(
            p, uniforms(self._integers([t.seed for t in turns]), self._integers([t.index for t in turns]), nuc.ids)
        )
        pick = torch.where(greedy, _first_max(p, nuc.ids), drawn)
        token = nuc.ids.gather(-1, pick.unsqueeze(-1)).squeeze(-1)
        # alpha = 0 is a bypass, not a contrast of strength zero: greedy is the argmax that `model.generate` takes.
        token = torch.where(greedy & (alpha == 0), plain, token)
        chosen = nuc.ids == token.unsqueeze(-1)

        before = nuc.log_p.masked_fill(~nuc.keep, -torch.inf).softmax(-1)
        kl_steer = kl_divergence(p.log(), before.log())
        figures: list[list[float]] = torch.stack(
            [
                token.double(),
                (before * chosen).sum(-1).double(),
                (p * chosen).sum(-1).double(),
                kl_detox.double(),
                kl_steer.double(),
                clipped.double(),
                fallback.double(),
                plain.double(),
                (before * (nuc.ids == plain.unsqueeze(-1))).sum(-1).double(),
                (~p.isnan().any(-1)).double(),
            ],
            dim=-1,
        ).tolist()  # the one transfer to the host a group
        return p, figures

    def _warmed(self, logits: Tensor, rows: Tensor, warmth: Tensor) -> Tensor:
        """`logits` over each row's temperature."""
        if bool((warmth == 1).all()):
            return logits
        by_row = torch.ones(len(logits), device=self.device)
        by_row[rows] = warmth.unsqueeze(-1)
        return logits.div_(by_row.unsqueeze(-1))

    def _mix(
        self, turns: Sequence[Turn], log_gen: Tensor, log_streams: Tensor, alpha: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each turn by its own rule."""
        by_rule: dict[str, list[int]] = {}
        for i, turn in enumerate(turns):
            by_rule.setdefault(turn.sampling.rule, []).append(i)
        p = torch.empty_like(log_gen)
        clipped, fallback = torch.empty_like(alpha), torch.empty_like(alpha, dtype=torch.bool)
        for rule, members in by_rule.items():
            at = torch.tensor(members, device=self.device)
            p[at], clipped[at], fallback[at] = RULES[rule](
                log_gen[at], log_streams[at], self.weights, alpha[at], keep[at]
            )
        return p, clipped, fallback

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _ruled_out(turn: Turn, logits: Tensor) -> Tensor:
    """`[vocab]` bool: what this turn may not choose."""
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool) if turn.allowed is None else turn.allowed
    fit = allowed.clone()
    fit[list(turn.banned)] = False
    # Where the constraint leaves nothing else, the ban yields: who banned it will see it again.
    return ~(fit if fit.any() else allowed).to(logits.device)


def _token_step(turn: Turn, figures: Sequence[float], distribution: tuple[Tensor, Tensor]) -> TokenStep:
    return TokenStep(
        index=turn.index,
        token_id=int(figures[0]),
        p_before=figures[1],
        p_after=figures[2],
        kl_detoxifier=max(figures[3], 0.0),
        kl_steering=max(figures[4], 0.0),
        clipped_mass=figures[5],
        fallback=bool(figures[6]),
        preferred_id=int(figures[7]),
        preferred_p=figures[8],
        steered=turn.steered and len(turn.rows) > 1,
        distribution=(distribution[0].cpu(), distribution[1].cpu()) if turn.keep_distribution else None,
    )


def _nothing_to_choose(turn: Turn) -> StepError:
    if turn.allowed is not None and not turn.allowed.any():
        return StepError("the constraint allows no token", hint="simplify the grammar")
    return StepError("the backbone gave logits that are not numbers", hint="try dtype='float32'")


def _first_max(p: Tensor, ids: Tensor) -> Tensor:
    """Index of the largest `p`; of equal ones that with the lowest token id, so that ties do not depend on sorting."""
    best = p == p.amax(-1, keepdim=True)
    return ids.masked_fill(~best, torch.iinfo(ids.dtype).max).argmin(-1)
