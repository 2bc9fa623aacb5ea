"""Decoding: a step for every seat, and what each sink says of its token. Knows seats and logits; knows no queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detox_guard.engine.base import End, Rewind
from detox_guard.engine.reports import as_exception
from detox_guard.errors import RequestCancelledError, StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.engine.base import EngineStats, Finish, TokenStep
    from detox_guard.engine.reports import Reports
    from detox_guard.engine.runner import Runner
    from detox_guard.engine.seats import Seat, Seats
    from detox_guard.steering.choose import Chooser

__all__ = ["Decoder"]


class Decoder:
    """Gives seats their tokens. An error of one seat's sink or constraint takes only that seat's request down."""

    def __init__(self, runner: Runner, seats: Seats, chooser: Chooser, reports: Reports, stats: EngineStats) -> None:
        self._runner = runner
        self._seats = seats
        self._chooser = chooser
        self._reports = reports
        self._stats = stats

    def step(self) -> None:
        """Feed every seat's last token to all of its rows, choose the next."""
        tokens = [0] * self._runner.rows
        fed = 0
        for seat in self._seats.decoding:
            for row in seat.rows:
                tokens[row.index] = seat.emitted[-1]
                fed += 1
        if fed != len(tokens):
            raise StepError(f"{len(tokens)} rows in the batch, but seats hold {fed}")
        self._emit(self._seats.decoding, self._runner.decode(tokens))

    def begin(self, seats: list[Seat]) -> None:
        """The first token of seats that have none, from the logits of their prompts."""
        self._emit(seats, None)

    def _emit(self, seats: list[Seat], logits: Tensor | None) -> None:
        """Choose a token for each seat and hand it over. Without `logits`, from those of the seats' prompts."""
        waiting = list(seats)
        while waiting:
            rows: list[Sequence[int]]
            if logits is None:
                stacked = torch.cat([seat.first_logits for seat in waiting])
                starts = [sum(len(seat.rows) for seat in waiting[:i]) for i in range(len(waiting))]
                rows = [range(start, start + len(seat.rows)) for seat, start in zip(waiting, starts, strict=True)]
            else:
                stacked = logits
                rows = [[row.index for row in seat.rows] for seat in waiting]
            # Their rows are known by now: one who leaves moves those of others.
            able = [(seat, own) for seat, own in zip(waiting, rows, strict=True) if self._can_choose(seat)]
            waiting = [seat for seat, _ in able]
            outcomes = self._chooser.choose(stacked, [seat.turn(own) for seat, own in able]) if able else []
            # A seat that was rewound to its prompt's end has no token to feed: it chooses again at once.
            waiting = [seat for seat, out in zip(waiting, outcomes, strict=True) if self._deliver(seat, out)]
            logits = None

    def _can_choose(self, seat: Seat) -> bool:
        """Ask a seat's constraint what may come next."""
        if seat.request.constraint is None:
            return True
        try:
            seat.allowed = seat.request.constraint.allowed()
        except BaseException as error:
            self._fail(seat, as_exception(error))
            return False
        return True

    def _deliver(self, seat: Seat, step: TokenStep | StepError) -> bool:
        """Give one seat its token; True if it must choose again from its prompt."""
        request = seat.request
        if isinstance(step, StepError):
            self._fail(seat, step)
            return False
        if request.cancelled:
            self._fail(seat, RequestCancelledError("the request was cancelled"))
            return False
        if seat.steered and not step.steered:
            self._fail(seat, StepError("a steered request was given a token that no contrast chose"))
            return False
        if step.token_id in request.end_ids:
            return self._end(seat, "stop")
        self._count(seat, step)
        seat.emitted.append(step.token_id)
        if seat.seen is not None:
            seat.seen = torch.unique(torch.cat([seat.seen, seat.seen.new_tensor([step.token_id])]))
        try:
            whole = request.constraint is not None and request.constraint.accept(step.token_id)
            verdict = request.sink.on_token(step)
            if isinstance(verdict, Rewind):
                return self._rewind(seat, verdict)
            if not isinstance(verdict, End):
                seat.steer(verdict)
        except BaseException as error:
            self._fail(seat, as_exception(error))
            return False
        if isinstance(verdict, End):
            return self._end(seat, verdict.reason)
        if whole:
            return self._end(seat, "stop")
        if len(seat.emitted) >= request.max_new_tokens:
            return self._end(seat, "length")
        return False

    def _end(self, seat: Seat, reason: Finish) -> bool:
        """The model is done with a seat; its sink may think otherwise. True as in `_deliver`."""
        try:
            verdict = seat.request.sink.on_end(reason)
            if isinstance(verdict, Rewind):
                return self._rewind(seat, verdict)
        except BaseException as error:
            self._fail(seat, as_exception(error))
            return False
        if isinstance(verdict, End):
            self._seats.leave(seat)
            self._reports.finished(seat.request, verdict.reason)
            return False
        self._seats.park(seat, reason)
        return False

    def ask_parked(self) -> None:
        """Those whose reply is over but not yet agreed to; who must go on takes a seat again."""
        again = []
        for seat in list(self._seats.parked):
            try:
                verdict = seat.request.sink.on_end(seat.reason)
            except BaseException as error:
                self._seats.drop_parked(seat)
                self._reports.failed(seat.request, as_exception(error))
                continue
            if verdict is None:
                continue
            if isinstance(verdict, End):
                self._seats.drop_parked(seat)
                self._reports.finished(seat.request, verdict.reason)
                continue
            self._seats.take_again(seat)
            try:
                if self._rewind(seat, verdict):
                    again.append(seat)
            except BaseException as error:
                self._fail(seat, as_exception(error))
        if again:
            self.begin(again)

    def _rewind(self, seat: Seat, verdict: Rewind) -> bool:
        """True if the seat has no token left, and so must choose again from its prompt."""
        self._seats.rewind(seat, verdict.tokens)
        self._stats.tokens_rewound += verdict.tokens
        seat.steer(verdict)
        return not seat.emitted

    def _count(self, seat: Seat, step: TokenStep) -> None:
        self._stats.steps_steered += step.steered
        if seat.steered:
            self._stats.tokens_steered += 1
            self._stats.fallbacks += step.fallback
        else:
            self._stats.tokens_plain += 1

    def _fail(self, seat: Seat, error: Exception) -> None:
        self._seats.leave(seat)
        self._reports.failed(seat.request, error)
