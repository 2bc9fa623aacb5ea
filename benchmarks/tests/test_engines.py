"""The bench of engines times each way in a process of its own. How fast anything is, no test says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from detox_benchmarks.speed.engines import run_engines
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard.errors import BackboneNotFoundError, InvalidParamsError

if TYPE_CHECKING:
    from pathlib import Path


def test_every_way_is_timed_against_generate(tmp_path: Path) -> None:
    make_tiny_model(make_tiny_config("llama")).save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    asked = {
        "model": str(tmp_path),
        "detoxifier": "random",
        "quick": True,
        "engines": ["float32", "generate"],
        "drafts": 0,
    }
    found = json.loads(run_engines(**asked))
    assert len(found["timings"]) == 8
    assert found["timings"]["generate: plain"]["over_generate"] == 1
    assert found["timings"]["float32: engine, steered"]["over_generate"] > 0
    assert found["about"]["tokens"] == 8
    assert found["about"]["drafts"] == 0
    assert set(found["about"]["peak_mib"]) == {"float32", "generate"}


def test_what_is_not_known_or_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidParamsError, match="engines"):
        run_engines(engines=["float32", "tensorrt"])
    with pytest.raises(BackboneNotFoundError, match="nothing-here"):
        run_engines(model=str(tmp_path / "nothing-here"), engines=["float32"], quick=True)
