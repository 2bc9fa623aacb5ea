"""Who decodes when: the queue, the seats, and the one thread that owns the batch. Knows requests; knows no text.

A loop turn, in this order: 1. drop what was cancelled; 2. admit from the queue, in arrival order, while rows are free;
3. a chunk of prefill; 4. one decoding step for every seat; 5. ask the parked ones again. Requests so join and leave
between any two steps.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch

from detox_guard.engine.cache import Row, RowCache
from detox_guard.engine.forward import Forward, Prefill
from detox_guard.engine.packing import can_pack, pack_linears
from detox_guard.engine.step import Chooser, Turn
from detox_guard.engine.types import Ended, Request, Rewind, TokenStep
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
from detox_guard.params import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.backbone import Backbone
    from detox_guard.engine.cache import LayerKV
    from detox_guard.engine.types import Finish, StreamSpec

__all__ = ["Engine", "EngineStats"]

_log = logging.getLogger("detox_guard.engine")
_POLL_S = 0.002
"""How often parked requests are asked again while nobody decodes."""


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
            None if request.constraint is None else request.constraint.allowed(),
        )


@dataclass(eq=False)
class _Parked:
    """A seat that left the batch while its sink makes up its mind, with what its rows held."""

    seat: _Seat
    layers: list[LayerKV]
    reason: Finish


class Engine:
    """Decodes many requests at once over one backbone. Thread-safe; its thread starts at the first request."""

    def __init__(
        self, backbone: Backbone, streams: Sequence[StreamSpec] = (), config: EngineConfig | None = None
    ) -> None:
        config = config or EngineConfig()
        if 1 + len(streams) > config.max_rows:
            raise EngineError(f"max_rows {config.max_rows} cannot seat one request of {1 + len(streams)} rows")
        if config.pack_weights and can_pack(backbone.model):
            pack_linears(backbone.model)
        self._worker = _Worker(Forward(backbone, streams), backbone.num_layers, config)
        bounds = (backbone.max_positions, backbone.window, config.max_slots)
        self.max_positions = min((b for b in bounds if b is not None), default=None)
        """Prompt, virtual tokens and new tokens together may not exceed this; None = no bound."""
        self.streams = len(streams)
        self._max_cached_slots = config.max_cached_slots
        self._vocab_size = backbone.vocab_size
        self._finalizer = weakref.finalize(self, self._worker.close)

    def submit(self, request: Request) -> None:
        """Queue a request; its sink hears the rest. Raises `PromptError`, `EngineBusyError`, `EngineClosedError`."""
        if request.steered and self.streams == 0:
            raise EngineError(
                "alpha > 0 asks for steering, but this engine has no detoxifier", hint="load one, or set alpha=0"
            )
        rows, asked = self._worker.rows(request), self._worker.slots(request)
        if self.max_positions is not None and asked > self.max_positions:
            prompt, new = len(request.prompt_ids), request.params.max_new_tokens
            raise PromptTooLongError(
                "prompt",
                f"{prompt} prompt + {asked - prompt - new} virtual + {new} new tokens = {asked}",
                f"at most {self.max_positions} positions",
                hint="shorten the prompt or lower max_new_tokens",
            )
        if rows * asked > self._max_cached_slots:
            raise PromptTooLongError(
                "prompt",
                f"{asked} positions in {rows} rows",
                f"at most {self._max_cached_slots} slots",
                hint="shorten the prompt, lower max_new_tokens, or raise EngineConfig.max_cached_slots",
            )
        if not request.prompt_ids:
            raise PromptError("prompt", request.prompt_ids, "at least one token")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self._vocab_size:
            raise PromptError("prompt", request.prompt_ids, f"token ids from 0 to {self._vocab_size - 1}")
        self._worker.submit(request)

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

    def __init__(self, forward: Forward, num_layers: int, config: EngineConfig) -> None:
        self._forward = forward
        self._chooser = Chooser([spec.weight for spec in forward.streams], forward.device)
        self._cache = RowCache(num_layers, config.max_rows, config.max_cached_slots)
        self._config = config
        self._virtual = max((len(spec.embeddings) for spec in forward.streams), default=0)
        self._wake = threading.Condition()
        self._queue: deque[Request] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._stats = EngineStats()
        self._seats: list[_Seat] = []
        self._parked: list[_Parked] = []
        # Requests out of the queue but not seated yet, in order, and their prompts' computation once it has begun.
        self._entering: list[Request] = []
        self._prefill: Prefill | None = None
        # Prompts computed lately: (ids, steered) -> logits of the first token and K/V, a row a stream.
        self._recent: OrderedDict[tuple[tuple[int, ...], bool], tuple[Tensor, list[LayerKV]]] = OrderedDict()

    # -- called from any thread

    def submit(self, request: Request) -> None:
        with self._wake:
            if self._closed:
                raise EngineClosedError("the engine is closed", hint="load the model again")
            if len(self._queue) >= self._config.max_queue:
                raise EngineBusyError(
                    f"queue: {len(self._queue)} requests are waiting, at most {self._config.max_queue} may",
                    hint="try again later, or raise EngineConfig.max_queue",
                )
            if self._thread is not None and not self._thread.is_alive():
                raise EngineClosedError("the engine's thread is gone (a forked process?)", hint="load the model again")
            self._queue.append(request)
            self._stats.submitted += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="detox-guard-engine", daemon=True)
                self._thread.start()
            self._wake.notify()

    def rows(self, request: Request) -> int:
        """The rows that this request takes."""
        return 1 + len(self._forward.streams) if request.steered else 1

    def slots(self, request: Request) -> int:
        """The most slots a row of this request will come to hold."""
        virtual = self._virtual if request.steered else 0
        return len(request.prompt_ids) + virtual + request.params.max_new_tokens

    def snapshot(self) -> EngineStats:
        with self._wake:
            copy = EngineStats(**{f.name: getattr(self._stats, f.name) for f in fields(EngineStats)})
            copy.seats = len(self._seats) + len(self._parked) + len(self._entering)
            copy.rows = len(self._cache.rows)
            copy.queued = len(self._queue)
            return copy

    @property
    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self, timeout_s: float = 10.0) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # -- the engine thread

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    if self._parked and not (self._queue or self._seats or self._entering or self._closed):
                        self._wake.wait(_POLL_S)
                    while not (self._queue or self._seats or self._parked or self._entering or self._closed):
                        self._wake.wait()
                    if self._closed:
                        break
                try:
                    self._turn()
                except BaseException as error:
                    # Not foreseen, so nothing in the batch can be trusted: all of it fails, the next one starts clean.
                    _log.exception("engine step failed")
                    self._fail_all(_as_step_error(error))
        self._fail_all(EngineClosedError("the engine was closed"))

    def _turn(self) -> None:
        self._drop_cancelled()
        if not self._entering:
            self._admit()
        try:
            computed = self._compute_prompts()
        except BaseException as error:
            # A prompt is computed apart from the batch, so those who are decoding lose nothing.
            _log.exception("prefill failed")
            computed, self._prefill = False, None
            with self._wake:
                failed, self._entering = self._entering, []
            for request in failed:
                self._report(request, _as_step_error(error))
        if computed:
            self._take_seats()
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
            if self._entering and all(request.cancelled for request in self._entering):
                dropped += self._entering
                self._entering, self._prefill = [], None
        for request in dropped:
            self._report(request, RequestCancelledError("the request was cancelled"))

    def _compute_prompts(self) -> bool:
        """A chunk of prefill for the requests that are entering; True when all their prompts are there."""
        # Equal prompts are computed once: samples of one prompt, a chat's retry, a question asked again.
        missing = [key for key in dict.fromkeys(map(_prompt_key, self._entering)) if key not in self._recent]
        if missing:
            if self._prefill is None:
                self._prefill = Prefill(self._forward, [ids for ids, _ in missing], [steered for _, steered in missing])
            if not self._prefill.advance(self._config.prefill_chunk):
                return False
            for key, (first, computed) in zip(missing, self._prefill.finish(), strict=True):
                # Copies: what `finish` gives are views into tensors of the whole group.
                copies: list[LayerKV] = [[(k.clone(), v.clone()) for k, v in layers] for layers in computed]
                self._recent[key] = first.clone(), copies
            self._prefill = None
        return bool(self._entering)

    def _take_seats(self) -> None:
        """Those whose prompts are computed join the batch. It is not to be trusted after an error in here: a row, or a
        layer of all rows, may be missing."""
        seated = []
        for request in list(self._entering):
            key = _prompt_key(request)
            self._recent.move_to_end(key)
            logits, rows = self._recent[key]
            seat = _Seat(request, logits)
            if request.params.repetition_penalty != 1.0:
                seat.seen = torch.tensor(sorted(set(request.prompt_ids)), device=self._chooser.device)
            with self._wake:
                seat.rows = [self._cache.add(layers) for layers in rows]
                seat.starts = [row.length for row in seat.rows]
                self._seats.append(seat)
                del self._entering[0]
            seated.append(seat)
        self._forget_prompts()
        self._emit(seated, None)

    def _forget_prompts(self) -> None:
        """Drop the prompts that were used longest ago, down to the configured size."""
        slots = {key: len(rows) * rows[0][0][0].shape[2] for key, (_, rows) in self._recent.items()}
        total = sum(slots.values())
        while self._recent and total > self._config.prompt_cache_slots:
            key, _ = self._recent.popitem(last=False)
            total -= slots[key]

    def _admit(self) -> None:
        """Take requests from the queue in arrival order: a group whose prompts fit one chunk, or one longer prompt."""
        config = self._config
        inside = [seat.request for seat in (*self._seats, *(parked.seat for parked in self._parked))]
        rows = sum(map(self.rows, inside))
        widest = max(map(self.slots, inside), default=0)
        with self._wake:
            while self._queue:
                head = self._queue[0]
                rows += self.rows(head)
                widest = max(widest, self.slots(head))
                full = rows > config.max_rows or rows * widest > config.max_cached_slots
                longest = max(len(request.prompt_ids) for request in (*self._entering, head))
                group = len(self._entering) + 1
                if (full and (inside or self._entering)) or (group > 1 and longest * group > config.prefill_chunk):
                    return
                self._entering.append(self._queue.popleft())

    def _decode(self) -> None:
        """One step: feed every seat's last token to all of its rows, choose the next."""
        tokens = [0] * len(self._cache.rows)
        fed = 0
        for seat in self._seats:
            for row in seat.rows:
                tokens[row.index] = seat.emitted[-1]
                fed += 1
        if fed != len(tokens):
            raise StepError(f"{len(tokens)} rows in the batch, but seats hold {fed}")
        self._emit(self._seats, self._forward.decode(self._cache, tokens))

    def _emit(self, seats: list[_Seat], logits: Tensor | None) -> None:
        """Choose a token for each seat and hand it over. Without `logits`, from those of the seats' prompts."""
        waiting = list(seats)
        while waiting:
            if logits is None:
                stacked = torch.cat([seat.first_logits for seat in waiting])
                starts = [sum(len(seat.rows) for seat in waiting[:i]) for i in range(len(waiting))]
                turns = [s.turn(range(a, a + len(s.rows))) for s, a in zip(waiting, starts, strict=True)]
            else:
                stacked = logits
                turns = [seat.turn([row.index for row in seat.rows]) for seat in waiting]
            outcomes = self._chooser.choose(stacked, turns)
            # A seat that was rewound to its prompt's end has no token to feed: it chooses again at once.
            waiting = [seat for seat, out in zip(waiting, outcomes, strict=True) if self._deliver(seat, out)]
            logits = None

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
            self._parked.append(_Parked(seat, [self._cache.copy(row) for row in seat.rows], reason))
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
                seat.rows = [self._cache.add(layers) for layers in parked.layers]
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
            self._cache.rewind(row, row.length - start - seat.kept)
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
            self._cache.remove(row)
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

    def _fail_all(self, error: DetoxGuardError) -> None:
        """Everyone in the batch hears of it; on a closed engine, everyone in the queue too."""
        with self._wake:
            requests = [seat.request for seat in (*self._seats, *(parked.seat for parked in self._parked))]
            requests += self._entering
            if self._closed:
                requests += self._queue
                self._queue.clear()
            self._seats.clear()
            self._parked.clear()
            self._entering, self._prefill = [], None
            self._cache.clear()
        for request in requests:
            self._report(request, error)


def _prompt_key(request: Request) -> tuple[tuple[int, ...], bool]:
    return tuple(request.prompt_ids), request.steered


def _as_exception(error: BaseException) -> Exception:
    """What ends a thread or a task (`SystemExit`, a panic in native code) must not end the engine's: it is an error."""
    return error if isinstance(error, Exception) else _as_step_error(error)


def _as_step_error(error: BaseException) -> DetoxGuardError:
    if isinstance(error, DetoxGuardError):
        return error
    step = StepError(f"a decoding step failed: {type(error).__name__}: {error}", hint="this is a bug, or out of memory")
    step.__cause__ = error
    return step
