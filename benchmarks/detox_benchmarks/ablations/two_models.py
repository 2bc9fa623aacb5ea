"""Contrastive decoding against a second model instead of a soft prompt (DExperts, Liu et al. 2021), to be measured.

Knows two models and their caches. What is chosen at a step is the engine's own `Chooser`, and a reply's text its own
`Reply`; only the batch, in which one set of weights serves all rows, could not be shared.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from detox_benchmarks.ablations.weights import load_weights
from detox_guard._reply import Reply, Speaker
from detox_guard.engine.base import End
from detox_guard.evaluation.methods import Drawn, Method
from detox_guard.evaluation.samples import row_of
from detox_guard.steering.choose import Chooser, Turn
from detox_guard.steering.forced import positions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from detox_benchmarks.ablations.weights import WeightTuning
    from detox_guard.evaluation.samples import Job
    from detox_guard.evaluation.store import Journal
    from detox_guard.models.backbone import Backbone
    from detox_guard.results import Chunk, Generation
    from detox_guard.settings import EngineConfig

__all__ = ["TwoModels", "decode_pair"]


@dataclass(frozen=True, kw_only=True)
class TwoModels(Method):
    """A method whose detoxifier is the model that `train_weights` left in `folder`; `weights_sha256` is of its file."""

    tuning: WeightTuning
    folder: Path
    weights_sha256: str

    def decode_all(
        self, backbone: Backbone, config: EngineConfig, jobs: Sequence[Job], journal: Journal, tick: Callable[[], None]
    ) -> None:
        """Draw what the journal lacks of `jobs`, as many at once as take `max_rows` rows in the two models."""
        second = load_weights(self.tuning, self.folder, backbone)
        waiting = [job for job in jobs if job.key not in journal]
        at_once = max(1, config.max_rows // 2)
        for first in range(0, len(waiting), at_once):
            some = waiting[first : first + at_once]
            started = time.perf_counter()
            speaker = Speaker(backbone, (self.weights_sha256[:12],))
            replies = [Reply(speaker, job.prompt, self.params.replace(seed=job.seed)) for job in some]
            made = decode_pair(backbone, second, replies)
            wall_s = round((time.perf_counter() - started) / len(some), 6)
            for job, reply in zip(some, made, strict=True):
                journal.add({**row_of(job, Drawn(reply, 1, reply.usage.completion_tokens)), "wall_s": wall_s})
                tick()
            journal.flush()

    def identity(self) -> dict[str, Any]:
        """As any method's, and the weights."""
        return {**super().identity(), "tuning": self.tuning, "weights_sha256": self.weights_sha256}


@torch.inference_mode()
def decode_pair(backbone: Backbone, second: Any, replies: Sequence[Reply]) -> list[Generation]:
    """Decode fresh replies in one left-padded batch, steered away from `second`, a model of the backbone's vocabulary.

    Seeds, parameters and end tokens are the replies' own; without a repetition penalty and a grammar.
    Raises `StepError` for logits that are not numbers.
    """
    requests = [reply.request for reply in replies]
    rows, width = len(requests), max(len(request.prompt.ids) for request in requests)
    ids = torch.full((rows, width), backbone.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt.ids) :] = torch.tensor(request.prompt.ids)
        mask[row, width - len(request.prompt.ids) :] = 1
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    done: list[Chunk | Exception] = []
    for reply in replies:
        reply.put = done.append
    models: list[tuple[Any, DynamicCache]] = [(backbone.model, DynamicCache()), (second, DynamicCache())]
    chooser = Chooser([-1.0])
    generations: dict[int, Generation] = {}
    step = 0
    while len(generations) < rows:
        positions = positions_of(mask)[:, -ids.shape[1] :]
        logits = [
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            for model, cache in models
        ]
        live = [row for row in range(rows) if row not in generations]
        turns = [Turn(requests[row].sampling, requests[row].seed, step, (row, rows + row), None) for row in live]
        # A reply that is over stays in the batch and is not read: the rows need no moving.
        fed = torch.full((rows, 1), backbone.pad_token_id)
        for row, chosen in zip(live, chooser.choose(torch.cat(logits).float(), turns), strict=True):
            if isinstance(chosen, Exception):
                raise chosen
            fed[row] = chosen.token_id
            ended = chosen.token_id in requests[row].end_ids
            stopped = not ended and replies[row].on_token(chosen) == End("stop")
            if ended or stopped or step + 1 == requests[row].max_new_tokens:
                replies[row].on_finish("stop" if ended or stopped else "length")
                last = done[-1]
                assert not isinstance(last, Exception)
                assert last.generation is not None, "a reply ends with its generation"
                generations[row] = last.generation
        ids = fed.to(backbone.device)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        step += 1
    return [generations[row] for row in range(rows)]
