"""A moment of mixed load on a tiny model: all are answered, and nothing is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_benchmarks.serving.soak import SoakConfig, run_soak
from tiny import make_tiny_backbone

if TYPE_CHECKING:
    from pathlib import Path


def test_all_are_answered_and_nothing_is_left(tmp_path: Path) -> None:
    backbone = make_tiny_backbone("llama", max_position_embeddings=2048)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    told = run_soak(
        SoakConfig(
            model=str(tmp_path), device="cpu", dtype="float32", minutes=0.05, clients=3, longest=60, tokens=8, seed=1
        )
    )
    assert told["errors"] == {}
    assert sum(told["asked"].values()) > 0
    assert told["left"] == {"seats": 0, "rows": 0, "queued": 0, "waiting": 0}
    assert told["texts_of_the_probe"] <= 1
    assert told["steered_tokens_all_contrasted"]
    assert told["counted"]["failed"] == 0
