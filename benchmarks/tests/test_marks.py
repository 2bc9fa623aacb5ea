"""What the bench of load takes for scored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from detox_benchmarks.serving.marks import Marks

if TYPE_CHECKING:
    from pathlib import Path


def test_a_sentence_longer_than_a_unit_is_scored_in_two_parts(tmp_path: Path) -> None:
    first = "It goes on and on, " * 12 + "and on"
    whole = first + " again"
    path = tmp_path / "marks.jsonl"
    path.write_text("".join(f"{json.dumps([1.0, 0.1, text])}\n" for text in (first, whole[-200:])))
    marks = Marks(path)
    assert marks.passed(whole, 2.0)
    assert not marks.passed(whole, 0.5)
    assert not marks.passed(whole.replace("again", "ever"), 2.0)
    assert not marks.passed("Nobody scored this. " + whole, 2.0)
