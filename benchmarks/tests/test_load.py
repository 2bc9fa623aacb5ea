"""The load of the server, on a tiny model and for a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_benchmarks.serving.load import LoadConfig, run_load

if TYPE_CHECKING:
    from detox_guard import DetoxiGen


def test_nothing_is_left_and_nothing_unscored(model: DetoxiGen) -> None:
    told = run_load(LoadConfig(clients=4, seconds=1.5, short=3, long=12, probes=5), model)
    assert set(told["answers"]) <= {"200", "hung up"}
    assert told["answers"]["200"] > 0
    assert told["unscored_pieces"] == 0
    assert told["guarded_pieces"] > 0
    assert told["left"] == {"seats": 0, "rows": 0, "queued": 0}
    assert told["tokens_per_s"] > 0
