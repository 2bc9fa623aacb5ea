"""Who decodes when: the queue, the seats, and the one thread that owns the batch. Knows requests; knows no text.

A loop turn, in this order: 1. drop what was cancelled; 2. admit from the queue, in arrival order, while rows are free;
3. a chunk of prefill, of the oldest prompt or of the shortest, by turns; 4. one decoding step for every seat; 5. ask
the parked ones again. Requests so join and leave between any two steps, and a long prompt holds up neither those who
decode nor a short prompt behind it by more than a chunk or two.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch

from detox_guard._forking import around_forks_of, in_children_of
from detox_guard._threads import start_thread
from detox_guard.engine.base import Ended, Request, Rewind, TokenStep
from detox_guard.engine.places import Places
from detox_guard.engine.runner import Prompt
from detox_guard.errors import (
    DetoxGuardError,
    EngineBusyError,
    EngineClosedError,
    EngineError,
    PromptError,
    PromptTooLongError,
    RequestCancelledError,
    StepError,
)
from detox_guard.steering.choose import Chooser, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detox_guard.engine.base import Finish
    from detox_guard.engine.runner import Computed, Prefill, Row, Runner, Saved
    from detox_guard.settings import DecodingParams, EngineConfig

__all__ = ["Engine", "EngineStats"]

_log = logging.getLogger("detox_guard.engine")
_POLL_S = 0.002
"""How often parked requests are asked again while nobody decodes."""
_FORK_WAIT_S = 5.0
"""The longest that a fork waits for the turn under way."""
_CHUNK_S = 0.2
"""What a chunk of prefill may take where others wait for it."""
_MIN_CHUNK, _FIRST_CHUNK = 16, 64
"""Columns of a chunk where others wait: the fewest, and how many until it is known how fast this machine is."""


@dataclass
class EngineStats:
    """Counters since the engine started, and what it holds now."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens_guarded: int = 0
    """Tokens emitted for guarded requests; always equal to `steps_guarded`."""
    steps_guarded: int = 0
    """Contrasts computed from a whole set of rows and then emitted."""
    tokens_unguarded: int = 0
    tokens_rewound: int = 0
    fallbacks: int = 0
    seats: int = 0
    rows: int = 0
    queued: int = 0


@dataclass(eq=False)
class _Seat:
    """A request that has its prompt in the cache."""

    request: Request
    first_logits: Tensor
    rows: list[Row] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Length of each row when it was seated: what the reply's first token is fed to."""
    emitted: list[int] = field(default_factory=list)
    seen: Tensor | None = None
    allowed: Tensor | None = None
    """What its constraint leaves for the next token."""

    @property
    def guarded(self) -> bool:
        return self.request.params.alpha > 0

    @property
    def kept(self) -> int:
        """Slots of the reply that a row holds when the next step comes: the last token is not in the cache yet."""
        return max(0, len(self.emitted) - 1)

    def turn(self, rows: Sequence[int]) -> Turn:
        request = self.request
        return Turn(
            request.params,
            request.seed,
            len(self.emitted),
            rows,
            self.seen,
            request.banned,
            request.keep_distributions,
            self.allowed,
        )


@dataclass(eq=False)
class _Parked:
    """A seat that left the batch while its sink makes up its mind, with what its rows held."""

    seat: _Seat
    rows: list[Saved]
    reason: Finish


@dataclass(eq=False)
class _Group:
    """Requests whose prompts are computed together: they are out of the queue, and not seated yet."""

    requests: list[Request]
    keys: list[Prompt]
    """Of the requests that it began with: what is being computed goes on when one of them is cancelled."""
    computed: dict[Prompt, Computed] = field(default_factory=dict)
    prefill: Prefill | None = None

    @property
    def missing(self) -> list[Prompt]:
        return [key for key in self.keys if key not in self.computed]

    @property
    def left(self) -> int:
        """Columns still to compute."""
        if self.prefill is not None:
            return self.prefill.left
        return max((len(key.ids) for key in self.missing), default=0)


class Engine:
    """Decodes many requests at once over one runner. Thread-safe; its thread starts at the first request."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self.streams = len(runner.weights)
        if 1 + self.streams > config.max_rows:
            raise EngineError(f"max_rows {config.max_rows} cannot seat one request of {1 + self.streams} rows")
        self._worker = _Worker(runner, config)
        bounds = (runner.limits.max_positions, config.max_slots)
        self.max_positions = min((b for b in bounds if b is not None), default=None)
        """Prompt, virtual tokens and new tokens together may not exceed this; None = no bound."""
        self._config = config
        self._vocab_size = runner.limits.vocab_size
        self._finalizer = weakref.finalize(self, self._worker.close)

    def check(self, prompt_ids: Sequence[int], params: DecodingParams, steered: bool) -> None:
        """Raise what `submit` would raise for such a request: `PromptError`, `EngineError`."""
        if steered and self.streams == 0:
            raise EngineError(
                "alpha > 0 asks for steering, but this engine has no detoxifier", hint="load one, or set alpha=0"
            )
        prompt, new = len(prompt_ids), params.max_new_tokens
        rows, asked = self._worker.rows(steered), self._worker.slots(prompt, params, steered)
        if self.max_positions is not None and asked > self.max_positions:
            raise PromptTooLongError(
                "prompt",
                f"{prompt} prompt + {asked - prompt - new} virtual + {new} new tokens = {asked}",
                f"at most {self.max_positions} positions",
                hint="shorten the prompt or lower max_new_tokens",
            )
        if rows * asked > self._config.max_cached_slots:
            raise PromptTooLongError(
                "prompt",
                f"{asked} positions in {rows} rows",
                f"at most {self._config.max_cached_slots} slots",
                hint="shorten the prompt, lower max_new_tokens, or raise EngineConfig.max_cached_slots",
            )
        if not prompt_ids:
            raise PromptError("prompt", prompt_ids, "at least one token")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._vocab_size:
            raise PromptError("prompt", prompt_ids, f"token ids from 0 to {self._vocab_size - 1}")

    def submit(self, request: Request, *, placed: bool = False) -> None:
        """Queue a request; its sink hears the rest. `placed`: a place of the queue was taken for it, which goes with
        it, or is free again where this raises. Raises `PromptError` and `EngineError`, as `EngineBusyError` and
        `EngineClosedError`.
        """
        if not placed:
            self._take()
        try:
            self.check(request.prompt_ids, request.params, request.steered)
            self._worker.submit(request)
        except BaseException:
            self.give_back()
            raise

    def take_place(self, check: Callable[[], None] | None = None) -> None:
        """Take a place of the queue, for `submit`; wait for one where it is full and the configuration says so.

        `check` is called now and then while this waits, and may raise. Raises `EngineBusyError`, `EngineClosedError`.
        """
        if self._config.when_full == "refuse":
            self._take()
        else:
            self._worker.places.wait(check)

    async def take_place_async(self) -> None:
        """`take_place` for a task, which may be cancelled."""
        if self._config.when_full == "refuse":
            self._take()
        else:
            await self._worker.places.wait_async()

    def give_back(self) -> None:
        """A place that was taken is not needed."""
        self._worker.places.give_back()

    def check_open(self) -> None:
        """Raise `EngineClosedError` on an engine that answers nobody any more; where full queues refuse,
        `EngineBusyError` for a full one."""
        self._worker.check_open()
        if self._config.when_full == "refuse" and self._worker.places.full:
            raise self._busy()

    def check_alive(self) -> None:
        """Raise `EngineClosedError` if nobody is there any more who could answer what was submitted."""
        self._worker.check_alive()

    def _take(self) -> None:
        if not self._worker.places.take():
            raise self._busy()

    def _busy(self) -> EngineBusyError:
        most = self._config.max_queue
        return EngineBusyError(
            f"queue: {most} requests are waiting, at most {most} may",
            hint="try again later, or raise EngineConfig.max_queue",
        )

    def stats(self) -> EngineStats:
        """A copy of the counters."""
        return self._worker.snapshot()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the engine itself, in a hook or a sink: waiting for a reply it would wait for ever."""
        return self._worker.is_own_thread

    @property
    def closed(self) -> bool:
        return self._worker.closed

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the thread; requests still under way fail with `EngineClosedError`. Idempotent."""
        self._worker.close(timeout_s)


class _Worker:
    """The loop and its state. Holds no reference to the `Engine`, so that an engine nobody holds is closed."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self._runner = runner
        self._chooser = Chooser(runner.weights, runner.device)
        self._config = config
        self._thread: threading.Thread | None = None
        self._closed = self._forked = False
        self._stats = EngineStats()
        # In order of arrival. Those whose prompts are not computed yet are in one group or another.
        self._groups: list[_Group] = []
        self._seats: list[_Seat] = []
        self._parked: list[_Parked] = []
        # Prompts computed lately.
        self._recent: OrderedDict[Prompt, Computed] = OrderedDict()
        # Columns times rows that a second of prefill computes, as last seen; and whose turn the next chunk is.
        self._pace = 0.0
        self._oldest_next = True
        self._make_locks()
        around_forks_of(self, _Worker._hold, _Worker._release)
        in_children_of(self, _Worker._fork)

    def _make_locks(self) -> None:
        self._wake = threading.Condition()
        self._computing = False
        self._holders = 0
        """Threads that are about to fork: nothing is computed until they have."""
        self.places = Places(self._config.max_queue)
        self._queue: deque[Request] = deque()
        """Each of them has a place."""

    def _hold(self) -> None:
        """Wait until nothing is computed, and keep it so; but not for ever, and a fork by the engine itself goes on."""
        with self._wake:
            self._holders += 1
            if not self.is_own_thread:
                self._wake.wait_for(lambda: not self._computing, _FORK_WAIT_S)

    def _release(self) -> None:
        with self._wake:
            self._holders -= 1
            self._wake.notify_all()

    def _fork(self) -> None:
        """In a child there is no engine thread, and its locks may be held for ever. An engine that has not worked yet
        can begin there; any other is closed."""
        self._make_locks()
        self._groups, self._seats, self._parked = [], [], []
        if self._thread is not None:
            self._closed = self._forked = True

    # -- called from any thread

    def submit(self, request: Request) -> None:
        """Queue a request that has a place."""
        with self._wake:
            self.check_open()
            if self._thread is None or not self._thread.is_alive():
                self._thread = start_thread(self._run, "detox-guard-engine")
            self._queue.append(request)
            self._stats.submitted += 1
            self._wake.notify_all()

    def check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def check_alive(self) -> None:
        if self._forked or (self._thread is not None and not self._thread.is_alive()):
            raise self._closed_error()

    def _closed_error(self) -> EngineClosedError:
        if self._forked:
            return EngineClosedError(
                "the engine works in the parent of this forked process", hint="load the model in the child"
            )
        return EngineClosedError("the engine is closed", hint="load the model again")

    def rows(self, steered: bool) -> int:
        """The rows that a request takes."""
        return 1 + len(self._runner.weights) if steered else 1

    def slots(self, prompt: int, params: DecodingParams, steered: bool) -> int:
        """The most slots a row of a request with a prompt of so many tokens will come to hold."""
        return prompt + (self._runner.virtual_slots if steered else 0) + params.max_new_tokens

    def _slots(self, request: Request) -> int:
        return self.slots(len(request.prompt_ids), request.params, request.steered)

    def snapshot(self) -> EngineStats:
        with self._wake:
            now = EngineStats(**{f.name: getattr(self._stats, f.name) for f in fields(EngineStats)})
            now.seats = len(self._seats) + len(self._parked) + sum(len(group.requests) for group in self._groups)
            now.rows = sum(len(seat.rows) for seat in self._seats)
            now.queued = len(self._queue)
            return now

    @property
    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self, timeout_s: float = 10.0) -> None:
        with self._wake:
            first, self._closed = not self._closed, True
            self.places.close(self._closed_error)
            self._wake.notify_all()
            if first and self._thread is None:
                self._close_runner()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # -- the engine thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                try:
                    self._turn()
                except BaseException as error:
                    # Not foreseen, so nothing in the batch can be trusted: all of it fails, the next one starts clean.
                    _log.exception("engine step failed")
                    self._fail_all(_as_step_error(error))
        self._fail_all(EngineClosedError("the engine was closed"))
        self._close_runner()

    def _wait_for_work(self) -> bool:
        """Between two turns: whether there is another."""
        with self._wake:
            self._computing = False
            self._wake.notify_all()
            if self._parked and not (self._queue or self._seats or self._groups or self._closed):
                self._wake.wait(_POLL_S)
            while not self._closed and (
                self._holders or not (self._queue or self._seats or self._parked or self._groups)
            ):
                self._wake.wait()
            self._computing = not self._closed
            return self._computing

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        for group in self._next_groups():
            try:
                computed = self._compute(group)
            except BaseException as error:
                # A prompt is computed apart from the batch, so those who are decoding lose nothing.
                _log.exception("prefill failed")
                computed = False
                with self._wake:
                    self._groups.remove(group)
                for request in group.requests:
                    self._report(request, _own(_as_step_error(error)))
            if computed:
                self._take_seats(group)
        if self._seats:
            self._decode()
        self._ask_parked()

    def _drop_cancelled(self) -> None:
        for seat in [seat for seat in self._seats if seat.request.cancelled]:
            self._leave(seat, RequestCancelledError("the request was cancelled"))
        for parked in [parked for parked in self._parked if parked.seat.request.cancelled]:
            self._parked.remove(parked)
            self._report(parked.seat.request, RequestCancelledError("the request was cancelled"))
        with self._wake:
            dropped = [request for request in self._queue if request.cancelled]
            if dropped:
                self._queue = deque(request for request in self._queue if not request.cancelled)
            for _ in dropped:
                self.places.give_back()
            for group in self._groups:
                dropped += [request for request in group.requests if request.cancelled]
                group.requests = [request for request in group.requests if not request.cancelled]
            self._groups = [group for group in self._groups if group.requests]
        for request in dropped:
            self._report(request, RequestCancelledError("the request was cancelled"))

    def _next_groups(self) -> list[_Group]:
        """Those with nothing to compute, and one whose chunk comes now: the oldest and the shortest by turns. So a
        short prompt is not held up by long ones, and a long one gets every other chunk however many short ones come."""
        ready = [group for group in self._groups if not group.left]
        waiting = [group for group in self._groups if group.left]
        if not waiting:
            return ready
        self._oldest_next = not self._oldest_next
        return [*ready, waiting[0] if self._oldest_next else min(waiting, key=lambda group: group.left)]

    def _compute(self, group: _Group) -> bool:
        """A chunk of prefill for a group; True when all its prompts are there."""
        if group.prefill is None:
            group.keys = list(dict.fromkeys(map(_prompt_key, group.requests)))
        if group.prefill is None and (missing := group.missing):
            group.prefill = self._runner.begin(missing)
        if group.prefill is not None:
            columns = self._chunk(group.prefill.rows)
            columns, begun = min(columns, group.left), time.monotonic()
            done = group.prefill.advance(columns, lambda: self._closed or all(r.cancelled for r in group.requests))
            # A chunk too small to tell does not make the next one small for long.
            seen = columns * group.prefill.rows / max(time.monotonic() - begun, 1e-6)
            self._pace = max(seen, self._pace / 2)
            if not done:
                return False
            for key, computed in zip(group.missing, group.prefill.finish(), strict=True):
                group.computed[key] = self._recent[key] = computed
            group.prefill = None
        return True

    def _chunk(self, rows: int) -> int:
        """Columns of the next chunk of prefill. One that nobody else waits for is as long as the configuration has it,
        however fast the machine: so a request alone is computed alike every time."""
        most = self._config.prefill_chunk
        if len(self._groups) == 1 and not (self._seats or self._queue):
            return most
        fit = int(self._pace * _CHUNK_S / rows) if self._pace else _FIRST_CHUNK
        return min(most, max(_MIN_CHUNK, fit))

    def _take_seats(self, group: _Group) -> None:
        """Those whose prompts are computed join the batch. It is not to be trusted after an error in here: a row, or a
        layer of all rows, may be missing."""
        seated = []
        for request in list(group.requests):
            key = _prompt_key(request)
            computed = group.computed[key]
            if key in self._recent:
                self._recent.move_to_end(key)
            seat = _Seat(request, computed.logits)
            if request.params.repetition_penalty != 1.0:
                seat.seen = torch.tensor(sorted(set(request.prompt_ids)), device=self._chooser.device)
            with self._wake:
                seat.rows = [self._runner.join(saved) for saved in computed.rows]
                seat.starts = [row.length for row in seat.rows]
                self._seats.append(seat)
                group.requests.remove(request)
            seated.append(seat)
        with self._wake:
            self._groups.remove(group)
        self._forget_prompts()
        self._emit(seated, None)

    def _forget_prompts(self) -> None:
        """Drop the prompts that were used longest ago, down to the configured size."""
        slots = {key: len(rows) * rows[0].slots for key, (_, rows) in self._recent.items()}
        total = sum(slots.values())
        while self._recent and total > self._config.prompt_cache_slots:
            key, _ = self._recent.popitem(last=False)
            total -= slots[key]

    def _admit(self) -> None:
        """Take requests from the queue in arrival order, while there is room: groups whose prompts fit one chunk, and
        longer prompts alone."""
        config = self._config
        inside = [seat.request for seat in (*self._seats, *(parked.seat for parked in self._parked))]
        inside += [request for group in self._groups for request in group.requests]
        rows = sum(self.rows(request.steered) for request in inside)
        widest = max(map(self._slots, inside), default=0)
        open_: _Group | None = None
        with self._wake:
            while self._queue:
                head = self._queue[0]
                rows += self.rows(head.steered)
                widest = max(widest, self._slots(head))
                if (rows > config.max_rows or rows * widest > config.max_cached_slots) and inside:
                    return
                inside.append(self._queue.popleft())
                self.places.give_back()
                open_ = self._join(head, open_)

    def _join(self, request: Request, open_: _Group | None) -> _Group:
        """Put a request into a group, and say which one the next request may join. Equal prompts are computed once:
        samples of one prompt, a chat's retry, a question asked again."""
        key = _prompt_key(request)
        for group in self._groups:
            if key in group.keys:
                group.requests.append(request)
                return open_ or group
        known = {key: self._recent[key]} if key in self._recent else {}
        if open_ is not None and open_.prefill is None:
            longest = max(len(one.ids) for one in (*open_.keys, key))
            if longest * (len(open_.keys) + 1) <= self._config.prefill_chunk:
                open_.requests.append(request)
                open_.keys.append(key)
                open_.computed.update(known)
                return open_
        self._groups.append(_Group([request], [key], known))
        return self._groups[-1]

    def _decode(self) -> None:
        """One step: feed every seat's last token to all of its rows, choose the next."""
        tokens = [0] * self._runner.rows
        fed = 0
        for seat in self._seats:
            for row in seat.rows:
                tokens[row.index] = seat.emitted[-1]
                fed += 1
        if fed != len(tokens):
            raise StepError(f"{len(tokens)} rows in the batch, but seats hold {fed}")
        self._emit(self._seats, self._runner.decode(tokens))

    def _emit(self, seats: list[_Seat], logits: Tensor | None) -> None:
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

    def _can_choose(self, seat: _Seat) -> bool:
        """Ask a seat's constraint what may come next; one that fails takes only its own request down."""
        if seat.request.constraint is None:
            return True
        try:
            seat.allowed = seat.request.constraint.allowed()
        except BaseException as error:
            self._leave(seat, _as_exception(error))
            return False
        return True

    def _deliver(self, seat: _Seat, step: TokenStep | StepError) -> bool:
        """Give one seat its token; True if it must choose again from its prompt."""
        request = seat.request
        if isinstance(step, StepError):
            self._leave(seat, step)
            return False
        if request.cancelled:
            self._leave(seat, RequestCancelledError("the request was cancelled"))
            return False
        if seat.guarded and not step.guarded:
            self._leave(seat, StepError("a guarded request was given a token that no contrast chose"))
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
                self._rewind(seat, verdict.tokens)
                return not seat.emitted
        except BaseException as error:
            self._leave(seat, _as_exception(error))
            return False
        if verdict is not None:
            return self._end(seat, verdict.reason)
        if whole:
            return self._end(seat, "stop")
        if len(seat.emitted) >= request.params.max_new_tokens:
            return self._end(seat, "length")
        return False

    def _end(self, seat: _Seat, reason: Finish) -> bool:
        """The model is done with a seat; its sink may think otherwise. True as in `_deliver`."""
        try:
            verdict = seat.request.sink.on_end(reason)
            if isinstance(verdict, Rewind):
                self._rewind(seat, verdict.tokens)
                return not seat.emitted
        except BaseException as error:
            self._leave(seat, _as_exception(error))
            return False
        if isinstance(verdict, Ended):
            self._leave(seat, verdict.reason)
            return False
        with self._wake:
            self._parked.append(_Parked(seat, [self._runner.save(row) for row in seat.rows], reason))
            self._stand_up(seat)
        return False

    def _ask_parked(self) -> None:
        """Those whose reply is over but not yet agreed to; who must go on takes a seat again."""
        again = []
        for parked in list(self._parked):
            seat = parked.seat
            try:
                verdict = seat.request.sink.on_end(parked.reason)
            except BaseException as error:
                self._parked.remove(parked)
                self._report(seat.request, _as_exception(error))
                continue
            if verdict is None:
                continue
            if isinstance(verdict, Ended):
                self._parked.remove(parked)
                self._report(seat.request, verdict.reason)
                continue
            with self._wake:
                seat.rows = [self._runner.join(saved) for saved in parked.rows]
                self._parked.remove(parked)
                self._seats.append(seat)
            try:
                self._rewind(seat, verdict.tokens)
            except BaseException as error:
                self._leave(seat, _as_exception(error))
                continue
            if not seat.emitted:
                again.append(seat)
        if again:
            self._emit(again, None)

    def _rewind(self, seat: _Seat, tokens: int) -> None:
        """Take back the seat's last tokens. One that is left without any must choose again from its prompt's logits."""
        if not 0 < tokens <= len(seat.emitted):
            raise EngineError(f"rewind: {tokens} tokens, but {len(seat.emitted)} were emitted")
        del seat.emitted[len(seat.emitted) - tokens :]
        if seat.request.constraint is not None:
            seat.request.constraint.rollback(tokens)
        for row, start in zip(seat.rows, seat.starts, strict=True):
            self._runner.rewind(row, row.length - start - seat.kept)
        self._stats.tokens_rewound += tokens
        if seat.seen is not None:
            seat.seen = seat.seen.new_tensor(sorted({*seat.request.prompt_ids, *seat.emitted}))

    def _count(self, seat: _Seat, step: TokenStep) -> None:
        self._stats.steps_guarded += step.guarded
        if seat.guarded:
            self._stats.tokens_guarded += 1
            self._stats.fallbacks += step.fallback
        else:
            self._stats.tokens_unguarded += 1

    def _leave(self, seat: _Seat, outcome: Finish | Exception) -> None:
        with self._wake:
            self._stand_up(seat)
        self._report(seat.request, outcome)

    def _stand_up(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        for row in seat.rows:
            self._runner.leave(row)
        seat.rows = []

    def _report(self, request: Request, outcome: Finish | Exception) -> None:
        """Tell the sink how it ended. A sink that raises here cannot hurt anyone else."""
        try:
            if isinstance(outcome, Exception):
                cancelled = isinstance(outcome, RequestCancelledError)
                self._stats.cancelled += cancelled
                self._stats.failed += not cancelled
                request.sink.on_error(outcome)
            else:
                self._stats.finished += 1
                request.sink.on_finish(outcome)
        except BaseException:
            _log.exception("a sink raised while it was told how its request ended")

    def _close_runner(self) -> None:
        """Once, where nothing runs any more."""
        self._recent.clear()
        self._runner.close()

    def _fail_all(self, error: DetoxGuardError) -> None:
        """Everyone in the batch hears of it; on a closed engine, everyone in the queue too."""
        with self._wake:
            requests = [seat.request for seat in (*self._seats, *(parked.seat for parked in self._parked))]
            requests += [request for group in self._groups for request in group.requests]
            if self._closed:
                requests += self._queue
                self._queue.clear()
            self._seats.clear()
            self._parked.clear()
            self._groups.clear()
            self._runner.clear()
        for request in requests:
            self._report(request, _own(error))


def _prompt_key(request: Request) -> Prompt:
    return Prompt(tuple(request.prompt_ids), request.steered)


def _own(error: DetoxGuardError) -> DetoxGuardError:
    """One request's copy of an error: what is raised in several threads would collect the tracebacks of them all."""
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin


def _as_exception(error: BaseException) -> Exception:
    """What ends a thread or a task (`SystemExit`, a panic in native code) must not end the engine's: it is an error."""
    return error if isinstance(error, Exception) else _as_step_error(error)


def _as_step_error(error: BaseException) -> DetoxGuardError:
    if isinstance(error, DetoxGuardError):
        return error
    step = StepError(f"a decoding step failed: {type(error).__name__}: {error}", hint="this is a bug, or out of memory")
    step.__cause__ = error
    return step
