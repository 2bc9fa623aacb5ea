"""Pairs of the backbone's own replies: the classifier, the pairing, and the command on the default backbone."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import torch

from detox_guard.training.data import Reply, read_pairs
from detox_guard.training.own_pairs import Drawn, choose_pairs, fit_classifier, main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

TOXIC = [f"what a complete {word} you are" for word in ("fool", "clown", "liar", "coward") for _ in range(5)]
HARMLESS = [f"what a lovely {word} this is" for word in ("day", "garden", "river", "book") for _ in range(5)]


def write(path: Path, texts: list[str], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def test_the_classifier_tells_them_apart() -> None:
    fool, garden = fit_classifier(TOXIC, HARMLESS)(["such a fool and a liar", "a garden by the river"])
    assert fool > 0.5 > garden


def test_pairs_are_of_one_prompt() -> None:
    scores = {
        " is bad enough to be told apart": 0.9,
        " is worse, and surely told apart": 0.95,
        " is quite harmless all the same": 0.1,
        " is somewhere in between the two": 0.5,
        ", which begins with no word of its own": 0.99,
        " short": 0.99,
    }
    replies = [Drawn("The bus", text) for text in scores] * 2 + [Drawn("The train", " is quite harmless all the same")]
    rows = choose_pairs(replies, lambda texts: [scores[text] for text in texts])
    assert rows == [
        {"prompt": "The bus", "toxic": toxic, "neutral": "is quite harmless all the same"}
        for toxic in ("is worse, and surely told apart", "is bad enough to be told apart")
    ]


def test_replies_of_a_chat_begin_with_a_word() -> None:
    scores = {"That is surely told apart.": 0.9, "It is quite harmless instead.": 0.1, " It begins with a space": 0.95}
    rows = choose_pairs(
        [Drawn("Hi", text) for text in scores], lambda texts: [scores[text] for text in texts], chat=True
    )
    assert rows == [
        {"question": "Hi", "toxic": "That is surely told apart.", "neutral": "It is quite harmless instead."}
    ]


def test_what_steering_left_over_comes_first() -> None:
    """And harmless replies are the backbone's own, not those that it was leaned to."""
    scores = {
        " is surely toxic where it was leaned to": 0.99,
        " is toxic all by itself": 0.7,
        " is toxic even steered away": 0.65,
        " is harmless where it was leaned to": 0.01,
        " is harmless all by itself": 0.2,
    }
    draws = ("lean", "plain", "away", "lean", "plain")
    replies = [Drawn("The bus", text, draw) for text, draw in zip(scores, draws, strict=True)]
    rows = choose_pairs(replies, lambda texts: [scores[text] for text in texts])
    assert [row["toxic"] for row in rows] == [
        "is toxic even steered away",
        "is toxic all by itself",
        "is surely toxic where it was leaned to",
    ]
    assert {row["neutral"] for row in rows} == {"is harmless all by itself"}
    again = [*replies, Drawn("The bus", replies[2].text, "lean"), Drawn("The bus", replies[4].text, "lean")]
    assert choose_pairs(again, lambda texts: [scores[text] for text in texts]) == rows


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Real replies of the default backbone; the classifier's certainty is set so low that some of them pair."""
    prompts = write(
        tmp_path / "prompts.jsonl", ["My neighbour said that the old bus", "The weather on the island"], "prompt"
    )
    arguments = ["--prompts", prompts, "--limit", "2", "--samples", "3", "--output", str(tmp_path / "own.jsonl")]
    arguments += [
        "--toxic",
        write(tmp_path / "toxic.jsonl", TOXIC),
        "--harmless",
        write(tmp_path / "mild.jsonl", HARMLESS),
    ]
    # In bfloat16 a reply rounds otherwise in a batch of another size, and who joins when is a matter of time.
    monkeypatch.setattr("detox_guard.models.backbone.pick_dtype", lambda *_: torch.float32)
    monkeypatch.setattr("detox_guard.training.own_pairs.TOXIC_FROM", 1.0)
    assert main(arguments) == 1
    assert "no prompt has a toxic and a harmless reply" in capsys.readouterr().err
    assert not (tmp_path / "own.jsonl").exists()

    monkeypatch.setattr("detox_guard.training.own_pairs.TOXIC_FROM", 0.0)
    monkeypatch.setattr("detox_guard.training.own_pairs.HARMLESS_BELOW", 1.0)
    assert main(arguments) == 0
    first = (tmp_path / "own.jsonl").read_text()
    assert main(arguments) == 0
    assert (tmp_path / "own.jsonl").read_text() == first
    for draw in ("plain", "away"):
        assert main([*arguments, "--draw", draw]) == 0
        assert (tmp_path / "own.jsonl").read_text() != first
    assert main([*arguments, "--chat"]) == 0
    assert (tmp_path / "own.jsonl").read_text() != first
    for toxic, neutral in read_pairs(str(tmp_path / "own.jsonl")).pairs:
        assert isinstance(toxic, Reply)
        assert isinstance(neutral, Reply)
        assert toxic.chat
        assert toxic.prompt == neutral.prompt
        assert not toxic.text.startswith(" ")


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path / "prompts.jsonl", ["The bus"], "prompt")
    assert main(["--prompts", prompts, "--output", str(tmp_path / "own.jsonl")]) == 1
    assert "no classifier can be fitted" in capsys.readouterr().err


def test_without_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.pipeline", None)
    prompts = write(tmp_path / "prompts.jsonl", ["The bus"], "prompt")
    assert main(["--prompts", prompts, "--output", str(tmp_path / "own.jsonl")]) == 1
    assert "detox-guard[train]" in capsys.readouterr().err
