"""The seats: requests whose prompts are in rows, those that decode and those that are parked. Knows no logits' meaning.

A seat is *parked* when its reply is over and its sink has not agreed yet: what its rows held is saved, and the rows are
free for others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from detox_guard.engine.base import Go
from detox_guard.engine.drafts import Drafter
from detox_guard.errors import EngineError
from detox_guard.steering.choose import Turn

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.engine.base import Finish, Request, Rewind, Sampling
    from detox_guard.engine.runner import Row, Runner, Saved

__all__ = ["Seat", "Seats"]


@dataclass(eq=False)
class Seat:
    """A request that decodes, or is parked."""

    request: Request
    first_logits: Tensor
    """`[rows, vocab]` of its prompt."""
    drafter: Drafter
    rows: list[Row] = field(default_factory=list)
    """The generator's, then one a view. None while it is parked."""
    starts: list[int] = field(default_factory=list)
    """Length of each row when it was seated: what the reply's first token is fed to."""
    emitted: list[int] = field(default_factory=list)
    seen: Tensor | None = None
    """Unique ids of prompt and reply, where a repetition penalty asks for them."""
    allowed: Tensor | None = None
    """What its constraint leaves for the next token."""
    course: Go = field(default_factory=Go)
    """How its sink wants the next token."""
    saved: Sequence[Saved] = ()
    """What its rows held when it was parked,"""
    reason: Finish = "stop"
    """and how the model ended its reply."""

    @property
    def sampling(self) -> Sampling:
        return self.course.sampling or self.request.sampling

    @property
    def steered(self) -> bool:
        return self.sampling.alpha > 0

    def turn(self, rows: Sequence[int]) -> Turn:
        """What it brings to a step whose logits of these rows are its own."""
        return Turn(
            self.sampling,
            self.request.seed,
            len(self.emitted),
            rows,
            self.seen,
            self.course.banned,
            self.request.keep_distributions,
            self.allowed,
        )

    def steer(self, verdict: Go | Rewind) -> None:
        """Set the course of the next token. Raises `EngineError`."""
        self.course = Go(verdict.sampling, verdict.banned)
        if self.steered and not self.request.prompt.steered:
            raise EngineError("alpha: raised above 0 for a request that has no rows to steer by")


class Seats:
    """Who decodes and who is parked. Whoever moves a seat holds `lock`, so that others count each seat once."""

    def __init__(self, runner: Runner, lock: threading.Condition) -> None:
        self._runner = runner
        self._lock = lock
        self.decoding: list[Seat] = []
        self.parked: list[Seat] = []

    @property
    def requests(self) -> list[Request]:
        return [seat.request for seat in (*self.decoding, *self.parked)]

    @property
    def rows(self) -> int:
        return sum(len(seat.rows) for seat in self.decoding)

    def take(self, request: Request, first_logits: Tensor, saved: Sequence[Saved]) -> Seat:
        """Seat a request whose prompt was computed."""
        seat = Seat(request, first_logits, Drafter(request.prompt.ids, request.end_ids))
        if request.sampling.repetition_penalty != 1.0:
            seat.seen = torch.tensor(sorted(set(request.prompt.ids)), device=self._runner.device)
        with self._lock:
            seat.rows = self._runner.join(saved, request.max_new_tokens)
            seat.starts = [row.length for row in seat.rows]
            self.decoding.append(seat)
        return seat

    def leave(self, seat: Seat) -> None:
        with self._lock:
            self.decoding.remove(seat)
            for row in seat.rows:
                self._runner.leave(row)
            seat.rows = []

    def trim(self, seat: Seat) -> None:
        """Take from a seat's rows what was fed beyond its reply. Its last token is not fed before the next step."""
        kept = max(0, len(seat.emitted) - 1)
        for row, start in zip(seat.rows, seat.starts, strict=True):
            if row.length > start + kept:
                self._runner.rewind(row, row.length - start - kept)

    def park(self, seat: Seat, reason: Finish) -> None:
        self.trim(seat)
        with self._lock:
            seat.saved, seat.reason = self._runner.save(seat.rows), reason
            self.parked.append(seat)
            self.leave(seat)

    def drop_parked(self, seat: Seat) -> None:
        self.parked.remove(seat)
        seat.saved = ()

    def take_again(self, seat: Seat) -> None:
        """A parked seat goes on."""
        with self._lock:
            seat.rows = self._runner.join(seat.saved, seat.request.max_new_tokens)
            self.parked.remove(seat)
            self.decoding.append(seat)
            seat.saved = ()

    def rewind(self, seat: Seat, tokens: int) -> None:
        """Take back a seat's last tokens. One that is left without any must choose again from its prompt's logits.

        Raises `EngineError`.
        """
        if not 0 < tokens <= len(seat.emitted):
            raise EngineError(f"rewind: {tokens} tokens, but {len(seat.emitted)} were emitted")
        if not seat.request.may_rewind:
            raise EngineError("rewind: the request was not submitted as one that may")
        del seat.emitted[len(seat.emitted) - tokens :]
        if seat.request.constraint is not None:
            seat.request.constraint.rollback(tokens)
        self.trim(seat)
        if seat.seen is not None:
            seat.seen = seat.seen.new_tensor(sorted({*seat.request.prompt.ids, *seat.emitted}))

    def clear(self) -> None:
        """Drop them all, whatever state they are in."""
        self.decoding.clear()
        self.parked.clear()
        self._runner.clear()
