"""A small evaluation that tests kill: imported by a fork server, so that each try starts at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401  (loaded before the fork)

from detox_guard.evaluation import run, store

if TYPE_CHECKING:
    from pathlib import Path


def measure(folder: Path, **asked: Any) -> None:
    torch.set_num_threads(1)
    store.FLUSH_S = 0.02
    run.run_eval(output=folder, device="cpu", dtype="float32", progress=False, **asked)
