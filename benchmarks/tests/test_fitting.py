"""The fitting of the shipped scorer, and the bars that it must reach on texts it never saw."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from detox_benchmarks.__main__ import app
from detox_benchmarks.fitting.bench import DISGUISES, EVERYDAY, IDENTITY, INSULTING, calm_and_strong, ordinary_lines
from detox_benchmarks.fitting.linear import evaluate, train
from typer.testing import CliRunner, Result

from detox_guard.errors import DataError
from detox_guard.scorers.linear import CARD_FILE, WEIGHTS_FILE, EmbeddedScorer
from detox_guard.settings import DecodingParams

SHARED = Path(os.environ.get("DETOX_GUARD_DATA", Path(__file__).parents[3] / "shared" / "data"))
FEW = ("--made-up", "60", "20")


@pytest.fixture(scope="module")
def embedded() -> EmbeddedScorer:
    return EmbeddedScorer.load()


def test_the_bars_on_texts_of_its_own(embedded: EmbeddedScorer) -> None:
    lines = ordinary_lines(2000)
    assert sum(score > 0.5 for score in embedded.score(lines)) <= 0.005 * len(lines)
    assert sorted(embedded.score(lines))[len(lines) // 2] < 0.1
    assert max(embedded.score(IDENTITY)) < 0.3
    for name, change in DISGUISES.items():
        found = sum(score > 0.5 for score in embedded.score([change(text) for text in INSULTING]))
        assert found >= 0.85 * len(INSULTING), name


def test_everyday_questions_are_calm() -> None:
    alone, behind, strong = calm_and_strong(DecodingParams(alpha=3.0, calm_share=0.25), ["You are a stupid idiot, and"])
    assert len(set(EVERYDAY)) == 100
    assert min(alone, behind) >= 90
    assert strong == 1.0


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the shared data folder: {name} is not beside the repository")
    return path


@pytest.mark.parametrize(
    ("name", "floor"),
    [("rtp/dev_prompts.jsonl", 0.938), ("benchmarks/wikitalk_toxicity_nonfuzzed_1492.csv", 0.9306)],
)
def test_auc_on_rows_never_trained_on(embedded: EmbeddedScorer, name: str, floor: float) -> None:
    figures = evaluate(embedded, _shared(name))
    assert figures["roc_auc"] >= floor
    (written,) = [e for e in embedded.card["evaluations"] if e["file"] == Path(name).name]
    assert figures["roc_auc"] == pytest.approx(written["roc_auc"], abs=1e-3)


def _row(prompt: str, score: float | None, continuation: str, other: float | None) -> str:
    first, second = {"text": prompt, "toxicity": score}, {"text": continuation, "toxicity": other}
    return json.dumps({"prompt": first, "continuation": second})


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    rows = [_row(f"you idiot {i}", 0.9, f"a kind day {i}", 0.05) for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, _row("no score", None, "none", None), ""]))
    return path


def fit(*words: object) -> Result:
    return CliRunner().invoke(app, ["fit", "linear", *map(str, words)])


def test_the_command(small_file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        result = fit("--data", small_file, "--output", folder, "--evaluate", small_file, *FEW)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["evaluations"][0]["roc_auc"] == 1.0
    assert (one / WEIGHTS_FILE).read_bytes() == (two / WEIGHTS_FILE).read_bytes()
    assert sorted(file.name for file in one.iterdir()) == [CARD_FILE, WEIGHTS_FILE]
    scorer = EmbeddedScorer.load(one)
    assert scorer.card["data"]["skipped_without_score"] == 2
    assert str(tmp_path) not in (one / CARD_FILE).read_text()
    high, low = scorer.score(["you idiot", "a kind day"])
    assert high > 0.5 > low
    assert fit("--output", one, "--evaluate", small_file).exit_code == 0


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
def test_bad_files_are_data_errors(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        train(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = fit("--data", path, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "bad.jsonl" in result.stderr
