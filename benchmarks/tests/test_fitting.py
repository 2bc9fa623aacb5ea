"""Fitting the embedded scorer: the command on a few rows, and the shipped weights on rows they never saw."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from detox_guard.errors import DataError
from detox_guard.scorers.linear import CARD_FILE, WEIGHTS_FILE, EmbeddedScorer


def _held_out(name: str) -> Path:
    folder = os.environ.get("DETOX_GUARD_DATA")
    if folder is None or not (Path(folder) / name).exists():
        pytest.skip(f"DETOX_GUARD_DATA names no folder with {name}")
    return Path(folder) / name


@pytest.mark.parametrize(
    ("name", "floor"),
    [("rtp/dev_prompts.jsonl", 0.938), ("benchmarks/wikitalk_toxicity_nonfuzzed_1492.csv", 0.9306)],
)
def test_auc_on_rows_never_trained_on(name: str, floor: float) -> None:
    pytest.importorskip("sklearn")
    from detox_benchmarks.fitting.linear import evaluate

    embedded = EmbeddedScorer.load()
    figures = evaluate(embedded, _held_out(name))
    assert figures["roc_auc"] >= floor
    (written,) = [e for e in embedded.card["evaluations"] if e["file"] == Path(name).name]
    assert figures["roc_auc"] == pytest.approx(written["roc_auc"], abs=1e-3)


FEW = ("--made-up", "60", "20")


def _row(prompt: str, score: float | None, continuation: str, other: float | None) -> str:
    first, second = {"text": prompt, "toxicity": score}, {"text": continuation, "toxicity": other}
    return json.dumps({"prompt": first, "continuation": second})


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    pytest.importorskip("scipy")
    pytest.importorskip("sklearn")
    rows = [_row(f"you idiot {i}", 0.9, f"a kind day {i}", 0.05) for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, _row("no score", None, "none", None), ""]))
    return path


def test_training_command(small_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from detox_benchmarks.fitting.linear import main

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        assert main(["--data", str(small_file), "--output", str(folder), "--evaluate", str(small_file), *FEW]) == 0
        assert json.loads(capsys.readouterr().out)["evaluations"][0]["roc_auc"] == 1.0
    assert (one / WEIGHTS_FILE).read_bytes() == (two / WEIGHTS_FILE).read_bytes()
    assert sorted(file.name for file in one.iterdir()) == [CARD_FILE, WEIGHTS_FILE]
    scorer = EmbeddedScorer.load(one)
    assert scorer.card["data"]["skipped_without_score"] == 2
    assert str(tmp_path) not in (one / CARD_FILE).read_text()
    high, low = scorer.score(["you idiot", "a kind day"])
    assert high > 0.5 > low
    assert main(["--output", str(one), "--evaluate", str(small_file)]) == 0


def test_a_write_that_fails_leaves_the_old_file(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detox_benchmarks.fitting import linear as scorer

    folder = tmp_path / "out"
    scorer.train(small_file, folder, made_up=(60, 20))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(scorer.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        scorer.train(small_file, folder, made_up=(60, 20))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[1]",
        '{"prompt": 1}',
        _row("a", 2.0, "b", 0.1),
        _row("a", None, "b", None),
        _row("a", 0.9, "b", 0.1),
    ],
)
def test_bad_training_files_are_data_errors(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    from detox_benchmarks.fitting.linear import main, train

    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        train(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["--data", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "bad.jsonl" in capsys.readouterr().err
