"""Decoding: a step for every seat, and what each sink says of its tokens. Knows seats and logits; knows no queue."""

from __future__ import annotations

from itertools import accumulate
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

    def __init__(
        self, runner: Runner, seats: Seats, chooser: Chooser, reports: Reports, stats: EngineStats, drafts: int = 0
    ) -> None:
        """`drafts`: the most tokens of a draft."""
        self._runner = runner
        self._seats = seats
        self._chooser = chooser
        self._reports = reports
        self._stats = stats
        self._drafts = drafts

    def step(self) -> None:
        """Feed every seat's last token to all of its rows, and a draft behind it; choose what comes next."""
        turns = [(seat, [row.index for row in seat.rows]) for seat in self._seats.decoding]
        draft = self._draft()
        tokens: list[Sequence[int]] = [()] * self._runner.rows
        for seat, rows in turns:
            for row in rows:
                tokens[row] = [seat.emitted[-1], *draft]
        if (fed := sum(len(rows) for _, rows in turns)) != len(tokens):
            raise StepError(f"{len(tokens)} rows in the batch, but seats hold {fed}")
        logits = self._runner.decode(tokens)
        had = len(turns[0][0].emitted)
        self.begin(self._emit(logits[:, 0], turns))
        if draft:
            self._follow(draft, had, logits, turns[0])

    def _draft(self) -> list[int]:
        """What the one seat that decodes is fed besides its last token. Where several decode there are no drafts: more
        rows cost what a draft costs, and bring a token each."""
        if len(self._seats.decoding) != 1:
            return []
        (seat,) = self._seats.decoding
        room = seat.request.max_new_tokens - len(seat.emitted) - 1
        most = min(self._drafts, room, self._runner.limits.at_once // self._runner.rows - 1)
        return seat.drafter.propose(seat.emitted, most) if most > 0 else []

    def _follow(self, draft: list[int], had: int, logits: Tensor, turn: tuple[Seat, Sequence[int]]) -> None:
        """Choose on, one token at a time, while a seat's reply behind its first `had` tokens is what the draft says;
        then take back what was fed too much. A reply that was rewound is shorter, one that is over has no rows."""
        seat, accepted = turn[0], 0
        while accepted < len(draft) and seat.rows and seat.emitted[had:] == draft[: accepted + 1]:
            accepted += 1
            self.begin(self._emit(logits[:, accepted], [turn]))
        if seat.rows:
            self._seats.trim(seat)
        seat.drafter.learn(len(draft), accepted)
        self._stats.tokens_drafted += len(draft)
        self._stats.tokens_accepted += accepted

    def begin(self, seats: list[Seat]) -> None:
        """The first token of seats that have none, from the logits of their prompts."""
        while seats:
            ends = list(accumulate(len(seat.rows) for seat in seats))
            rows = [range(end - len(seat.rows), end) for seat, end in zip(seats, ends, strict=True)]
            logits = torch.cat([seat.first_logits for seat in seats])
            seats = self._emit(logits, list(zip(seats, rows, strict=True)))

    def _emit(self, logits: Tensor, turns: Sequence[tuple[Seat, Sequence[int]]]) -> list[Seat]:
        """Choose a token for each seat from its rows of `logits [rows, vocab]`, and hand it over. Those that were
        rewound to their prompt's end have no token to feed: they choose again at once."""
        # Their rows were looked up before: one who leaves moves those of others.
        able = [(seat, rows) for seat, rows in turns if self._can_choose(seat)]
        outcomes = self._chooser.choose(logits, [seat.turn(rows) for seat, rows in able]) if able else []
        return [seat for (seat, _), out in zip(able, outcomes, strict=True) if self._deliver(seat, out)]

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
