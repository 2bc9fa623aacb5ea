"""For the tests of training: a small run, and the files that it reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tiny import TEXTS, make_tiny_backbone

from detox_guard.training import TrainingConfig, train_detoxifier

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.models.backbone import Backbone


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def pairs_file(folder: Path) -> Path:
    rows = [{"toxic": f"zzz qqq {text}", "neutral": [f"aaa eee {text}", "unused"]} for text in TEXTS]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"toxic": "alone"}\n')
    return path


def settings(folder: Path, output: str = "out", **changes: Any) -> TrainingConfig:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    fields: dict[str, Any] = {
        "data": data,
        "output": folder / output,
        "virtual_tokens": 4,
        "steps": 12,
        "batch_size": 4,
        "reply_tokens": 12,
        "passage_tokens": (20, 40),
        "learning_rate": 0.5,
        "heldout": 6,
        "checkpoint_steps": 3,
        "licence": "CC0-1.0",
    }
    return TrainingConfig(**{**fields, **changes})


def quiet(step: int, steps: int, loss: float) -> None:
    """No progress bar in the tests."""


def train(config: TrainingConfig, backbone: Backbone | None = None) -> Detoxifier:
    return train_detoxifier(config, backbone=backbone or make_tiny_backbone("llama"), progress=quiet)
