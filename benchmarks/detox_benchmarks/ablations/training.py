"""Trains one variant of an ablation, unless it is there already, and says what that took and gave.

Knows what of a variant is kept: its folder, `variant.json` once that is whole. Training itself is
`detox_guard.training`'s and `weights`'; nothing is decoded here.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from detox_benchmarks.ablations.weights import bytes_of, heldout_loss, train_weights, weights_logits
from detox_guard._files import write_whole
from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream
from detox_guard.errors import DataError
from detox_guard.steering.forced import reply_logits
from detox_guard.training.config import FILES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from detox_benchmarks.ablations.variants import AblationConfig, Variant
    from detox_guard._progress import Progress, Stage
    from detox_guard.models.backbone import Backbone
    from detox_guard.training.examples import Batch, Examples

__all__ = ["Trained", "VariantTraining"]

VARIANT_FILE = "variant.json"
_BESIDE = {"output", "resume", "notes", "licence", "checkpoint_steps", "model", "revision", "device", "dtype", *FILES}
"""Fields of a training that its result does not depend on, or that are told by what they hold."""


@dataclass(frozen=True)
class Trained:
    """A detoxifier to measure: soft prompts, or else another set of weights."""

    name: str
    facts: dict[str, Any]
    streams: tuple[SteeringStream, ...] = ()
    weights: Variant | None = None


_Outcome = tuple[int, str, tuple[float, float]]
"""Trained parameters, their SHA-256, and the held-out loss before and after."""


class _Clock:
    """A training's `progress`: moves a bar, and tells the time of its steps from that of measuring before and after."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._ticks_s = [time.perf_counter()]

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self._ticks_s.append(time.perf_counter())
        self._stage.say(f"loss {loss:.3f}")
        self._stage.tick()

    def seconds(self, steps: int) -> float | None:
        """Of so many steps, by those that were seen; None if a run was taken up behind its last."""
        ticks_s = self._ticks_s[1:] if len(self._ticks_s) > 2 else self._ticks_s
        if len(ticks_s) < 2:
            return None
        return round((ticks_s[-1] - ticks_s[0]) / (len(ticks_s) - 1) * steps, 2)


class VariantTraining:
    """What the variants of one ablation share: the backbone, the rows that none learns from, neutral passages."""

    def __init__(
        self,
        config: AblationConfig,
        backbone: Backbone,
        heldout: Sequence[str],
        passages: Sequence[str],
        bars: Progress,
    ) -> None:
        self._config, self._backbone, self._bars = config, backbone, bars
        self._heldout, self._passages = heldout, passages

    def train(self, variant: Variant) -> Trained:
        """The variant, trained now unless its folder has it whole. Raises `DataError` where that holds another."""
        path = variant.folder / VARIANT_FILE
        identity = self._identity(variant)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if kept is not None and kept["identity"] != identity:
            raise DataError(f"{path.parent}: holds a variant of other settings or data", hint="take another folder")
        if kept is None:
            variant.folder.mkdir(exist_ok=True)
            with self._bars.stage(f"training, {variant.name}", variant.training.steps) as stage:
                kept = {"identity": identity, "facts": self._facts(variant, _Clock(stage))}
            write_whole(path, json.dumps(kept, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
        if variant.tuning != "prompt":
            return Trained(variant.name, kept["facts"], weights=variant)
        detoxifier = Detoxifier.load(variant.folder)
        detoxifier.validate(self._backbone)
        return Trained(variant.name, kept["facts"], (SteeringStream(detoxifier),))

    def _identity(self, variant: Variant) -> dict[str, Any]:
        """What makes the variant what it is, as JSON."""
        return {
            "tuning": variant.tuning,
            "rank": self._config.lora_rank if variant.tuning == "lora" else None,
            "training": variant.training.model_dump(mode="json", exclude=_BESIDE),
            "texts_sha256": [_sha256(texts) for texts in (variant.rows, self._heldout, self._passages)],
            "backbone": [self._backbone.id, self._backbone.revision, str(self._backbone.dtype)],
        }

    def _facts(self, variant: Variant, clock: _Clock) -> dict[str, Any]:
        """Train it, and say what that took and gave."""
        own = variant.training
        train = self._prompt if variant.tuning == "prompt" else self._weights
        parameters, sha256, (before, after) = train(variant, clock)
        return {
            "tuning": variant.tuning,
            "trained_parameters": parameters,
            "bytes": bytes_of(parameters, self._backbone.dtype),
            "training_s": clock.seconds(own.steps),
            "steps": own.steps,
            "batch_size": own.batch_size,
            "learning_rate": own.learning_rate,
            "rows": variant.learned,
            "passes": round(own.steps * own.batch_size / variant.learned, 3),
            "heldout_loss_before": before,
            "heldout_loss_after": after,
            "sha256": sha256,
        }

    def _prompt(self, variant: Variant, clock: _Clock) -> _Outcome:
        from detox_guard.training.trainer import train_detoxifier

        variant.write_rows()
        detoxifier = train_detoxifier(variant.training, backbone=self._backbone, progress=clock)
        examples = self._examples(variant)
        losses = [
            self._loss(partial(self._soft_logits, soft, variant), examples)
            for soft in (self._start(variant), detoxifier.embeddings)
        ]
        return detoxifier.embeddings.numel(), detoxifier.sha256, (losses[0], losses[1])

    def _weights(self, variant: Variant, clock: _Clock) -> _Outcome:
        from detox_guard.training.examples import Steps

        assert variant.tuning != "prompt"
        own, examples = variant.training, self._examples(variant)
        steps = Steps(examples, variant.rows, (), (), own)  # the very batches of prompt tuning

        def batch(step: int) -> Batch:
            return steps[step]["batch"]

        before = self._loss(partial(weights_logits, self._backbone.model), examples)
        trained = train_weights(
            variant.tuning,
            self._backbone,
            batch,
            steps=own.steps,
            learning_rate=own.learning_rate,
            rank=self._config.lora_rank,
            seed=own.seed,
            folder=variant.folder,
            progress=clock,
        )
        after = self._loss(partial(weights_logits, trained.model), examples)
        return trained.parameters, trained.sha256, (before, after)

    def _examples(self, variant: Variant) -> Examples:
        from detox_guard.training.examples import make_examples

        return make_examples(variant.training, self._backbone, self._passages)

    def _start(self, variant: Variant) -> torch.Tensor:
        """The soft prompt before training: the initial text's embeddings, tiled, as PEFT makes it."""
        own = variant.training
        ids = list(self._backbone.tokenizer(own.initial_text)["input_ids"])
        tiled = (ids * own.virtual_tokens)[: own.virtual_tokens]
        with torch.no_grad():
            embedded: torch.Tensor = self._backbone.model.get_input_embeddings()(
                torch.tensor(tiled, device=self._backbone.device)
            )
        return embedded

    def _soft_logits(self, soft: torch.Tensor, variant: Variant, batch: Batch) -> torch.Tensor:
        return reply_logits(self._backbone.model, soft.to(self._backbone.device), batch, variant.training.position)

    def _loss(self, logits_of: Callable[[Batch], torch.Tensor], examples: Examples) -> float:
        config = self._config
        return heldout_loss(
            logits_of,
            examples,
            self._heldout,
            rows=config.batch_size,
            seed=config.seed,
            device=self._backbone.device,
        )


def _sha256(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
