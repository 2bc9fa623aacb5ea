"""Models written to folders for tests of loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tiny import make_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

if TYPE_CHECKING:
    from pathlib import Path


def save(path: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(path)
    make_tiny_tokenizer().save_pretrained(path)
    return path


def causal(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
