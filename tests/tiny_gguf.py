"""Tiny Llamas as GGUF files, F32, for llama.cpp: the weights and the tokenizer of `tiny`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detox_benchmarks.speed.gguf_files import write_gguf
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def make_tiny_gguf(
    file: Path, *, name: str = "Tiny Llama", rounded: str | None = None, **config: Any
) -> PreTrainedModel:
    """Write a tiny Llama; `rounded`: a name of `GGMLQuantizationType` for its matrices. Gives the torch model."""
    model = make_tiny_model(make_tiny_config("llama", **config))
    write_gguf(file, model, make_tiny_tokenizer(), name=name, rounded=rounded)
    return model
