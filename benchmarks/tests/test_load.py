"""The load of the server, on a tiny model and for a moment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from detox_benchmarks.serving.load import LoadConfig, run_load
from detox_benchmarks.serving.marks import Marker, Marks

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_is_left_and_nothing_unscored(tiny_folder: Path, detoxifier_folder: Path) -> None:
    told = run_load(
        LoadConfig(
            model=str(tiny_folder),
            detoxifier=str(detoxifier_folder),
            clients=4,
            seconds=1.5,
            warmup=0.5,
            bare=0.5,
            overload=1,
            short=3,
            long=12,
            probes=5,
        )
    )
    assert told["errors"] == {}
    assert set(told["answers"]) <= {"200", "429", "hung up"}
    assert told["answers"]["200"] > 0
    assert told["unscored_pieces"] == 0
    assert told["guarded_pieces"] > 0
    assert told["bars"]["seats back"]
    assert told["decoded_tokens_per_s"] > 0
    assert told["bare_tokens_per_s"] > 0
    assert told["http_first_text_ms"]["count"] == 5


def test_marks_tell_what_was_passed_and_when(tmp_path: Path) -> None:
    path = tmp_path / "marks.jsonl"
    insult = "You are a stupid idiot, and everybody hates you."
    scores = Marker(path).score(["It rains. We stay at home.", insult])
    assert scores[0] < 0.5 < scores[1]
    marks = Marks(path)
    now = time.monotonic()
    assert len(marks) == 1
    assert marks.passed(" We stay at home. ", now)
    assert marks.passed("rains", now)
    assert not marks.passed("We stay at home.", 0)
    assert not marks.passed("We went home.", now)
    assert not marks.passed(insult, now)
    assert marks.passed("[removed]", 0)
