"""Continuations under one method or several, into a journal. Knows the model; judges nothing.

A row: `method`, `prompt` and `sample` (its key), `seed`, `text`, `finish_reason`, `token_ids`; divergences by step in
nats (empty where nothing was steered), `fallbacks` and `clipped` summed over steps; `tries`, `decoded_tokens` of what
was drawn for it; `interventions` of the guard; `wall_s`, this row's share of the time; and the `trace` of a prompt's
first sample.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.evaluation.methods import Drawn, Method
    from detox_guard.evaluation.prompts import Asked
    from detox_guard.evaluation.store import Journal

__all__ = ["Job", "decode", "row_of", "seed_of"]


@dataclass(frozen=True)
class Job:
    """One sample to draw: `index` is the prompt's place in the run."""

    method: Method
    index: int
    prompt: Asked
    sample: int
    seed: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.method.name, self.index, self.sample


def seed_of(seed: int, prompt: int, sample: int, samples: int) -> int:
    """The seed of one sample: the same for every method, so that methods differ by what they do and not by luck."""
    return (seed * 1_000_003 + prompt * samples + sample) % 2**63


def decode(model: DetoxiGen, jobs: Iterable[Job], journal: Journal, tick: Callable[[], None]) -> None:
    """Draw every sample that the journal lacks, twice as many at once as the batch has rows (if the queue takes so
    many). `tick` hears of each.

    Raises the first error of any; what was drawn until then is kept.
    """
    waiting = [job for job in jobs if job.key not in journal]
    mark = time.perf_counter()
    at_once = min(len(waiting), 2 * model.config.max_rows, model.config.max_queue)
    pool = ThreadPoolExecutor(max(1, at_once), "detox-guard-eval")
    try:
        for done in as_completed([pool.submit(_row, model, job) for job in waiting]):
            now = time.perf_counter()
            journal.add({**done.result(), "wall_s": round(now - mark, 6)})
            mark = now
            tick()
    finally:
        # Not waited for: after an error or Ctrl-C the model is closed next, which ends what is under way at once.
        pool.shutdown(wait=False, cancel_futures=True)
        journal.flush()


def _row(model: DetoxiGen, job: Job) -> dict[str, Any]:
    return row_of(job, job.method.draw(model, job.prompt, job.seed))


def row_of(job: Job, drawn: Drawn) -> dict[str, Any]:
    """The row of one sample, all but its `wall_s`."""
    reply = drawn.generation
    tokens = reply.trace.tokens if reply.trace else ()
    steered = tokens if job.method.params.alpha > 0 else ()
    row: dict[str, Any] = {
        "method": job.method.name,
        "prompt": job.index,
        "sample": job.sample,
        "seed": job.seed,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "token_ids": [token.token_id for token in tokens],
        "kl_detoxifier": [_capped(token.kl_detoxifier) for token in steered],
        "kl_steering": [_capped(token.kl_steering) for token in steered],
        "fallbacks": sum(token.fallback for token in steered),
        "clipped": round(sum(token.clipped_mass for token in steered), 4),
        "tries": drawn.tries,
        "decoded_tokens": drawn.decoded_tokens,
        "interventions": len(reply.interventions),
    }
    if job.sample == 0 and reply.trace:
        row["trace"] = {
            kind: [{name: _capped(value) for name, value in one.items()} for one in many]
            for kind, many in reply.trace.to_dict().items()
        }
    return row


def _capped(value: Any) -> Any:
    """JSON has no infinity, which a divergence may be; and four digits are enough."""
    return round(min(value, 1e4), 4) if isinstance(value, float) else value
