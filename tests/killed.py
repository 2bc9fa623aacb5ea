"""Small runs that tests kill: imported by a fork server, so that each try starts at once."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401  (loaded before the fork)

from detox_guard import _progress as progress
from detox_guard.adapt import adapt
from detox_guard.evaluation import run, store
from detox_guard.training import config, own_pairs, trainer  # noqa: F401  (loaded before the fork)

if TYPE_CHECKING:
    from pathlib import Path


def measure(folder: Path, **asked: Any) -> None:
    torch.set_num_threads(1)
    store.FLUSH_S = 0.02
    run.run_eval(output=folder, device="cpu", dtype="float32", progress=False, **asked)


def adapting(asked: dict[str, Any], cache: str, phase: str, count: int) -> None:
    """Adapt, and die at the `count`-th tick of the bar of this phase; "" lives."""
    torch.set_num_threads(1)
    os.environ["DETOX_GUARD_CACHE"] = cache
    own_pairs.SURELY_TOXIC, own_pairs.SURELY_HARMLESS = 0.0, 1.0  # what a random model says is neither
    real, left = progress.Progress.stage, [count]

    def stage(bars: Any, name: str, total: int, done: int = 0) -> Any:
        def heard(**change: Any) -> None:
            left[0] -= name == phase and "what" not in change
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        return nullcontext(progress.Stage(heard)) if name == phase else real(bars, name, total, done)

    progress.Progress.stage = stage  # type: ignore[method-assign]
    adapt(config.AdaptConfig(**asked), bars=False)
