"""The bench runs, counts its tokens and reports every figure. How fast anything is, no test says."""

from __future__ import annotations

import contextlib
import io
import json
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console
from tiny import make_tiny_backbone, make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard.errors import EngineError, InvalidParamsError
from detox_guard.evaluation import run_bench
from detox_guard.evaluation.bench import RATIOS, Bar, all_of, ways_of

if TYPE_CHECKING:
    from pathlib import Path


def test_long_prompts_are_new_each_time() -> None:
    backbone = make_tiny_backbone("llama")
    guard = SimpleNamespace(backbone=backbone, stream=lambda prompt, params: asked.append(prompt) or iter(()))
    asked: list[str] = []
    ways = ways_of(guard, 4, 60, 2)  # type: ignore[arg-type]
    for name in ("long context, plain", "long context, steered") * 2:
        with contextlib.suppress(Exception):  # nothing was decoded
            ways[name]()
    ids = {tuple(backbone.tokenizer(prompt)["input_ids"]) for prompt in asked}
    assert len(asked) == len(ids) == 4
    assert all(58 <= len(one) <= 60 for one in ids)  # decoded and read again


def test_a_second_turn_is_its_first_and_more() -> None:
    backbone = make_tiny_backbone("llama")
    guard = SimpleNamespace(backbone=backbone, stream=lambda prompt, params: asked.append(prompt) or iter(reply))
    asked: list[str] = []
    reply = [SimpleNamespace(generation=SimpleNamespace(usage=SimpleNamespace(completion_tokens=1)))]
    ways_of(guard, 4, 60, 2)["second turn, steered"]()  # type: ignore[arg-type]
    first, second = asked
    assert second.startswith(first)
    assert second != first


def test_quick_bench_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    make_tiny_model(make_tiny_config("llama")).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    report = run_bench(model=str(folder), detoxifier="random", device="cpu", dtype="float32", quick=True)

    assert set(report.ratios) == set(RATIOS)
    assert all(bar.value > 0 and math.isfinite(bar.value) for bar in report.ratios.values())
    assert len(report.timings) == 7
    for name in ("engine, plain", "engine, steered", "engine, steered, many"):
        assert {"ms_per_token", "tokens_per_s", "ttft_ms", "p50_ms", "p95_ms"} == set(report.timings[name])

    line = report.to_json()
    assert "\n" not in line
    about = json.loads(line)["about"]
    assert about["detoxifier"] == ["random"]
    assert about["tokens"] == 8
    assert {"cpu", "cores", "threads", "capability"} <= set(about["machine"])
    assert about["versions"]["torch"] == torch.__version__
    assert about["peak_mib"] is None or about["peak_mib"] > 10

    shown = io.StringIO()
    Console(file=shown, width=160).print(report.table())
    assert "float32" in shown.getvalue()
    assert about["machine"]["cpu"] in shown.getvalue()


@pytest.mark.parametrize("change", [{"tokens": 1}, {"runs": 0}, {"streams": 0}, {"context": 0}])
def test_counts_out_of_bounds(change: dict[str, int]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(change))):
        run_bench(model="no/such-model", **change)


def test_bars() -> None:
    assert Bar(1.1, 1.15, at_most=True).met
    assert not Bar(1.2, 1.15, at_most=True).met
    assert Bar(4.6, 4.5, at_most=False).met
    assert not Bar(4.4, 4.5, at_most=False).met


def test_a_short_run_is_an_error() -> None:
    assert all_of(8, 8) == 8
    with pytest.raises(EngineError, match="7 tokens instead of 8"):
        all_of(7, 8)
