"""The bench of drafts asks each question both ways. How much faster anything is, no test says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from detox_benchmarks.speed.drafts import DraftsConfig, run_drafts

from detox_guard.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def test_answers_are_timed_with_drafts_and_without(tiny_folder: Path, tmp_path: Path) -> None:
    questions = [{"id": str(i), "question": f"What is {i}?", "answers": [{"text": "red"}]} for i in range(4)]
    paragraph = {"context": "What is red is red. " * 3, "qas": questions}
    file = tmp_path / "xquad.json"
    file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    asked = {"xquad": str(file), "questions": 3, "model": str(tiny_folder), "detoxifier": "random", "device": "cpu"}
    found = json.loads(run_drafts(DraftsConfig(**asked, dtype="float32", temperature=0, max_new_tokens=24)))
    assert found["answers timed"] == found["answers alike"] == 3
    assert found["tokens"] == 3 * 24
    assert 0 <= found["accepted"] <= found["drafted"]
    assert found["decoding, without / with"] > 0
    with pytest.raises(DataError, match="longer than"):
        run_drafts(DraftsConfig(**asked, max_new_tokens=4))
