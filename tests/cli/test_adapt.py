"""`detox-guard adapt` and `detoxifiers`, on a tiny random model in a folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tiny import TEXTS, make_tiny_config, make_tiny_model, make_tiny_tokenizer
from typer.testing import CliRunner, Result

from detox_guard.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, and an empty cache."""
    folder = tmp_path_factory.mktemp("adapt")
    make_tiny_model(make_tiny_config("llama", num_hidden_layers=1)).save_pretrained(folder / "tiny-here")
    make_tiny_tokenizer().save_pretrained(folder / "tiny-here")
    (folder / "rows.txt").write_text("\n".join(TEXTS))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(here / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "DETOX_GUARD_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def words(here: Path, *more: str | Path) -> tuple[str | Path, ...]:
    rows = here / "rows.txt"
    return ("adapt", here / "tiny-here", "--data", rows, "--anchors", rows, "--judge", "embedded", *more)


def test_adapted_listed_shown_and_removed(here: Path) -> None:
    assert "none yet" in run("detoxifiers").stdout
    small = ("--steps", "4", "--virtual-tokens", "3", "--device", "cpu", "--output", here / "made")
    made = run(*words(here, *small, "--json"))
    assert made.exit_code == 0, made.stderr
    facts = json.loads(made.stdout)
    assert facts["folder"] == str(here / "made")
    assert facts["card"]["virtual_tokens"] == 3
    for phase in ("first tuning, 1 steps", "its own replies", "second tuning, 3 steps", "measuring before and after"):
        assert phase in made.stderr
    name = facts["registered"]
    assert name.startswith("tiny-here-")

    again = run(*words(here, *small))
    assert "expected max" in again.stdout
    assert f"registered as {name}" in again.stdout

    (listed,) = map(json.loads, run("detoxifiers", "--json").stdout.splitlines())
    assert (listed["name"], listed["base_id"], listed["sha256"]) == (name, "tiny-here", facts["sha256"])
    assert name in run("detoxifiers").stdout
    shown = json.loads(run("detoxifiers", name, "--json").stdout)
    assert shown["card"] == facts["card"]
    assert "| plain |" in shown["readme"]
    text = run("detoxifiers", name).stdout
    for part in ("detox-guard adapt tiny-here", "A detoxifier for tiny-here", listed["folder"]):
        assert part in text
    assert "library_name" not in text

    absent = run("detoxifiers", "absent")
    assert (absent.exit_code, name in absent.stderr) == (3, True)
    assert run("detoxifiers", name, "--remove", name).exit_code == 2
    assert run("detoxifiers", "--remove", name).stdout == f"removed {name}\n"
    assert run("detoxifiers", "--json").stdout == ""
    assert run("detoxifiers", "--remove", name).exit_code == 3


def test_stopped_with_ctrl_c(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detox_guard.training.trainer.train_detoxifier", stop)
    stopped = run(*words(here, "--steps", "4", "--output", here / "stopped"))
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in stopped.stderr
    assert (here / "stopped" / "work" / "plan.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--steps", "0"), "steps: 0"),
        (("--minutes", "-1"), "minutes: -1"),
        (("--push-to-hub", "name"), "push_to_hub: 'name'"),
        (("--data", "absent.txt"), "absent.txt: no such file"),
    ],
)
def test_bad_usage(here: Path, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    result = run(*words(here, *more, "--output", tmp_path / "out"))
    assert result.exit_code == 2
    assert said in result.stderr
