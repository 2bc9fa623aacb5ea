"""Who decodes when: the queue, the seats, and the one thread that owns the batch. Knows requests; knows no text.

A loop turn, in this order: 1. drop what was cancelled; 2. admit from the queue, in arrival order, while rows are free;
3. a chunk of prefill; 4. one decoding step for every seat. Requests so join and leave between any two steps.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch

from detox_guard.engine.cache import Row, RowCache
from detox_guard.engine.forward import Forward, Prefill
from detox_guard.engine.packing import can_pack, pack_linears
from detox_guard.engine.step import Chooser, Turn
from detox_guard.engine.types import Request, Rewind, TokenStep
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
    from detox_guard.engine.types import Finish, StreamSpec

__all__ = ["Engine", "EngineStats"]

_log = logging.getLogger("detox_guard.engine")


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
    emitted: list[int] = field(default_factory=list)
    seen: Tensor | None = None

    @property
    def guarded(self) -> bool:
        return self.request.params.alpha > 0

    def turn(self, rows: Sequence[int]) -> Turn:
        request = self.request
        allowed = None if request.constraint is None else request.constraint.allowed()
        return Turn(
            request.params, request.seed, len(self.emitted), rows, self.seen, request.keep_distributions, allowed
        )


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
        self._virtual = max((len(spec.embeddings) for spec in streams), default=0)
        bounds = (backbone.max_positions, backbone.window, config.max_slots)
        self.max_positions = min((b for b in bounds if b is not None), default=None)
        """Prompt, virtual tokens and new tokens together may not exceed this; None = no bound."""
        self.streams = len(streams)
        self._max_cached_slots = config.max_cached_slots
        self._vocab_size = backbone.vocab_size
        self._finalizer = weakref.finalize(self, self._worker.close)

    def submit(self, request: Request) -> None:
        """Queue a request; its sink hears the rest. Raises `PromptError`, `EngineBusyError`, `EngineClosedError`."""
        params = request.params
        if params.alpha > 0 and self.streams == 0:
            raise EngineError(
                "alpha > 0 asks for steering, but this engine has no detoxifier", hint="load one, or set alpha=0"
            )
        virtual = self._virtual if params.alpha > 0 else 0
        asked = len(request.prompt_ids) + virtual + params.max_new_tokens
        if self.max_positions is not None and asked > self.max_positions:
            raise PromptTooLongError(
                "prompt",
                f"{len(request.prompt_ids)} prompt + {virtual} virtual + {params.max_new_tokens} new tokens = {asked}",
                f"at most {self.max_positions} positions",
                hint="shorten the prompt or lower max_new_tokens",
            )
        rows = 1 + self.streams if params.alpha > 0 else 1
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

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the thread; requests still under way fail with `EngineClosedError`. Idempotent."""
        self._worker.close(timeout_s)


class _Worker:
    """The loop and its state. Holds no reference to the `Engine`, so that an engine nobody holds is closed."""

    def __init__(self, forward: Forward, num_layers: int, config: EngineConfig) -> None:
        self._forward = forward
        self._chooser = Chooser([spec.weight for spec in forward.streams], forward.device)
        self._cache = RowCache(num_layers)
        self._config = config
        self._virtual = max((len(spec.embeddings) for spec in forward.streams), default=0)
        self._wake = threading.Condition()
        self._queue: deque[Request] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._stats = EngineStats()
        self._seats: list[_Seat] = []
        # Requests out of the queue but not seated yet, in order, and their prompts' computation once it has begun.
        self._entering: list[Request] = []
        self._prefill: Prefill | None = None

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

    def snapshot(self) -> EngineStats:
        with self._wake:
            copy = EngineStats(**{f.name: getattr(self._stats, f.name) for f in fields(EngineStats)})
            copy.seats, copy.rows = len(self._seats) + len(self._entering), len(self._cache.rows)
            copy.queued = len(self._queue)
            return copy

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
                    while not (self._queue or self._seats or self._entering or self._closed):
                        self._wake.wait()
                    if self._closed:
                        break
                try:
                    self._turn()
                except Exception as error:
                    # Not foreseen, so nothing in the batch can be trusted: all of it fails, the next one starts clean.
                    _log.exception("engine step failed")
                    self._fail_all(_as_step_error(error))
        self._fail_all(EngineClosedError("the engine was closed"))

    def _turn(self) -> None:
        self._drop_cancelled()
        try:
            self._enter()
        except Exception as error:
            # A prompt is computed apart from the batch, so those who are decoding lose nothing.
            _log.exception("prefill failed")
            self._prefill = None
            with self._wake:
                failed, self._entering = self._entering, []
            for request in failed:
                self._report(request, _as_step_error(error))
        if self._seats:
            self._decode()

    def _drop_cancelled(self) -> None:
        for seat in [seat for seat in self._seats if seat.request.cancelled]:
            self._leave(seat, RequestCancelledError("the request was cancelled"))
        with self._wake:
            dropped = [request for request in self._queue if request.cancelled]
            if dropped:
                self._queue = deque(request for request in self._queue if not request.cancelled)
            if self._entering and all(request.cancelled for request in self._entering):
                dropped += self._entering
                self._entering, self._prefill = [], None
        for request in dropped:
            self._report(request, RequestCancelledError("the request was cancelled"))

    def _enter(self) -> None:
        """A chunk of prefill for the requests that are entering; those whose prompts are in take their seats."""
        if not self._entering:
            self._admit()
        if not self._entering:
            return
        if self._prefill is None:
            guarded = [request.params.alpha > 0 for request in self._entering]
            self._prefill = Prefill(self._forward, [request.prompt_ids for request in self._entering], guarded)
        if not self._prefill.advance(self._config.prefill_chunk):
            return
        ready = self._prefill.finish()
        self._prefill = None
        seated = []
        for logits, rows in ready:
            request = self._entering[0]
            seat = _Seat(request, logits)
            if request.params.repetition_penalty != 1.0:
                seat.seen = torch.tensor(sorted(set(request.prompt_ids)), device=self._chooser.device)
            with self._wake:
                seat.rows = [self._cache.add(layers) for layers in rows]
                self._seats.append(seat)
                del self._entering[0]
            seated.append(seat)
        self._emit(seated, None)

    def _admit(self) -> None:
        """Take requests from the queue in arrival order: a group whose prompts fit one chunk, or one longer prompt."""
        config = self._config
        inside = [seat.request for seat in self._seats]
        rows = sum(map(self._rows, inside))
        widest = max(map(self._slots, inside), default=0)
        with self._wake:
            while self._queue:
                head = self._queue[0]
                rows += self._rows(head)
                widest = max(widest, self._slots(head))
                full = rows > config.max_rows or rows * widest > config.max_cached_slots
                longest = max(len(request.prompt_ids) for request in (*self._entering, head))
                group = len(self._entering) + 1
                if (full and (inside or self._entering)) or (group > 1 and longest * group > config.prefill_chunk):
                    return
                self._entering.append(self._queue.popleft())

    def _rows(self, request: Request) -> int:
        return 1 + len(self._forward.streams) if request.params.alpha > 0 else 1

    def _slots(self, request: Request) -> int:
        """The most slots a row of this request will come to hold."""
        return len(request.prompt_ids) + self._virtual + request.params.max_new_tokens

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
            self._leave(seat, "stop")
            return False
        self._count(seat, step)
        seat.emitted.append(step.token_id)
        if seat.seen is not None:
            seat.seen = torch.unique(torch.cat([seat.seen, seat.seen.new_tensor([step.token_id])]))
        try:
            whole = request.constraint is not None and request.constraint.accept(step.token_id)
            verdict = request.sink.on_token(step)
            if isinstance(verdict, Rewind):
                return self._rewind(seat, verdict.tokens)
        except Exception as error:
            self._leave(seat, error)
            return False
        if verdict == "stop" or whole:
            self._leave(seat, "stop")
        elif len(seat.emitted) >= request.params.max_new_tokens:
            self._leave(seat, "length")
        return False

    def _rewind(self, seat: _Seat, tokens: int) -> bool:
        if not 0 < tokens <= len(seat.emitted):
            raise EngineError(f"rewind: {tokens} tokens, but {len(seat.emitted)} were emitted")
        if seat.request.constraint is not None:
            seat.request.constraint.rollback(tokens)
        del seat.emitted[len(seat.emitted) - tokens :]
        # The last emitted token is never in the cache yet. After the rewind that holds for the new last one, which is
        # fed again; back at the prompt's end there is none to feed, and the prompt's own logits are chosen from again.
        for row in seat.rows:
            self._cache.rewind(row, tokens if seat.emitted else tokens - 1)
        self._stats.tokens_rewound += tokens
        if seat.seen is not None:
            seat.seen = seat.seen.new_tensor(sorted({*seat.request.prompt_ids, *seat.emitted}))
        return not seat.emitted

    def _count(self, seat: _Seat, step: TokenStep) -> None:
        self._stats.steps_guarded += step.guarded
        if seat.guarded:
            self._stats.tokens_guarded += 1
            self._stats.fallbacks += step.fallback
        else:
            self._stats.tokens_unguarded += 1

    def _leave(self, seat: _Seat, outcome: Finish | Exception) -> None:
        with self._wake:
            self._seats.remove(seat)
            for row in seat.rows:
                self._cache.remove(row)
        self._report(seat.request, outcome)

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
        except Exception:
            _log.exception("a sink raised while it was told how its request ended")

    def _fail_all(self, error: DetoxGuardError) -> None:
        """Everyone in the batch hears of it; on a closed engine, everyone in the queue too."""
        with self._wake:
            requests = [seat.request for seat in self._seats]
            requests += self._entering
            if self._closed:
                requests += self._queue
                self._queue.clear()
            self._seats.clear()
            self._entering, self._prefill = [], None
            self._cache.clear()
        for request in requests:
            self._report(request, error)


def _as_step_error(error: Exception) -> DetoxGuardError:
    if isinstance(error, DetoxGuardError):
        return error
    step = StepError(f"a decoding step failed: {type(error).__name__}: {error}", hint="this is a bug, or out of memory")
    step.__cause__ = error
    return step
