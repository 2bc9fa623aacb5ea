"""Training: whole runs on tiny models, and their configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny import TEXTS, make_tiny_backbone
from training_kit import pairs_file, settings, train, write

from detox_guard.detoxifiers.card import Position
from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.errors import (
    DataError,
    DetoxGuardError,
    DetoxifierFormatError,
    DetoxifierMismatchError,
    InvalidParamsError,
)
from detox_guard.training import train_detoxifier
from detox_guard.training.examples import KINDS

# 4. Whole runs


@pytest.mark.parametrize("position", get_args(Position))
def test_a_run(tmp_path: Path, position: Position) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.1)  # smooth enough to learn on in a few steps
    weights = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    seen: list[tuple[int, int, float]] = []
    config = settings(tmp_path, position=position, steps=30, learning_rate=0.3)
    trained = train_detoxifier(config, backbone=backbone, progress=lambda *step: seen.append(step))

    assert [step for step, _, _ in seen] == list(range(1, 31))
    card = trained.card
    assert set(card.heldout_loss_before) == {*KINDS, "mean"}
    assert all(card.heldout_loss_after[kind] < card.heldout_loss_before[kind] for kind in card.heldout_loss_before)
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())

    trained.validate(backbone)
    saved = Detoxifier.load(tmp_path / "out")
    assert (saved.sha256, saved.card) == (trained.sha256, card)
    assert (card.base_id, card.position, card.steps, card.seed) == (backbone.id, position, 30, 0)
    (source,) = card.data
    assert (source.name, source.rows, source.licence) == ("rows.jsonl", len(TEXTS), "CC0-1.0")
    assert str(tmp_path) not in (tmp_path / "out" / "detoxifier_card.json").read_text()
    assert (tmp_path / "out" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "detoxifier_card.json",
        "loss_curve.png",
    }


def test_initial_text_is_tiled(tmp_path: Path) -> None:
    """At a learning rate of almost nothing the soft prompt stays the text's embeddings, as PEFT tiles them."""
    backbone = make_tiny_backbone("llama")
    trained = train(settings(tmp_path, initial_text="ab", virtual_tokens=5, steps=1, learning_rate=1e-12), backbone)
    ids = backbone.tokenizer("ab")["input_ids"]
    wanted = backbone.model.get_input_embeddings()(torch.tensor((ids * 5)[:5]))
    torch.testing.assert_close(trained.embeddings, wanted)


def test_same_seed_same_tensor(tmp_path: Path) -> None:
    first, again, other = (
        train(settings(tmp_path, output, seed=seed)) for output, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.sha256 == again.sha256 != other.sha256


def test_learned_positions_and_files_of_contexts(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("The museum opens at nine.\nThe river is long.\n")
    backbone = make_tiny_backbone("gpt2")
    trained = train(settings(tmp_path, contexts=[tmp_path / "plain.txt"], passage_tokens=(300, 400)), backbone)
    assert [source.name for source in trained.card.data] == ["rows.jsonl", "plain.txt"]


def test_pairs_teach_the_difference(tmp_path: Path) -> None:
    """After a few steps the held-out toxic texts are told from their neutral twins, wherever they stand."""
    backbone = make_tiny_backbone("llama", initializer_range=0.1)
    changes = {"pairs": pairs_file(tmp_path), "steps": 60, "learning_rate": 0.3, "batch_size": 8}
    before = train(settings(tmp_path, "a", **{**changes, "learning_rate": 1e-12}), backbone).card
    trained = train(settings(tmp_path, "b", **changes), backbone)
    assert set(trained.card.heldout_aim) == {*KINDS, "mean"}
    assert trained.card.heldout_aim["mean"] > max(0.9, before.heldout_aim["mean"])
    assert [(source.name, source.rows) for source in trained.card.data] == [
        ("rows.jsonl", len(TEXTS)),
        ("pairs.jsonl", len(TEXTS)),
    ]


def test_anchors_hold(tmp_path: Path) -> None:
    """Held hard to the frozen backbone on the very texts it is trained on, a soft prompt learns less of them."""
    backbone = make_tiny_backbone("llama", initializer_range=0.1)
    free = train(settings(tmp_path, "a", learning_rate=0.3), backbone).card.heldout_loss_after["mean"]
    anchored = settings(tmp_path, "b", learning_rate=0.3, anchors=tmp_path / "rows.jsonl", anchor_weight=50.0)
    assert train(anchored, backbone).card.heldout_loss_after["mean"] > free


def test_going_on_from_a_detoxifier(tmp_path: Path) -> None:
    backbone = make_tiny_backbone("llama")
    first = train(settings(tmp_path, "a"), backbone)
    again = train(settings(tmp_path, "b", start=tmp_path / "a", steps=1, learning_rate=1e-12), backbone)
    torch.testing.assert_close(again.embeddings, first.embeddings)
    assert again.card.start_sha256 == first.sha256
    assert again.card.command is not None
    assert "--start a" in again.card.command
    with pytest.raises(InvalidParamsError, match="virtual_tokens"):
        train(settings(tmp_path, "c", start=tmp_path / "a", virtual_tokens=5), backbone)
    with pytest.raises(DetoxifierMismatchError):
        train(settings(tmp_path, "c", start=tmp_path / "a"), make_tiny_backbone("gpt2"))


KILLED = """
import os, pathlib, signal, sys
sys.path[:0] = {folders!r}
import training_kit as t
def progress(step, steps, loss):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
t.train_detoxifier(t.settings(pathlib.Path({folder!r})), backbone=t.make_tiny_backbone("llama"), progress=progress)
"""


def test_resume_after_a_kill(tmp_path: Path) -> None:
    code = KILLED.format(folders=[str(Path(__file__).parents[1])], folder=str(tmp_path), step=8)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    out = tmp_path / "out"
    with pytest.raises(DetoxifierFormatError):
        Detoxifier.load(out)
    (run,) = (out / "checkpoints").glob("*/")
    assert {path.name for path in run.iterdir()} == {"checkpoint-3", "checkpoint-6"}
    (run / "checkpoint-7").mkdir()  # one that was cut off while it was written

    steps: list[int] = []
    resumed = train_detoxifier(
        settings(tmp_path), backbone=make_tiny_backbone("llama"), progress=lambda step, *_: steps.append(step)
    )
    whole = train(settings(tmp_path, "whole"))
    assert steps == [7, 8, 9, 10, 11, 12]
    assert resumed.sha256 == whole.sha256
    assert resumed.card.heldout_loss_before == whole.card.heldout_loss_before
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("changes", [{"resume": False}, {"learning_rate": 0.25}])
def test_another_run_starts_anew(tmp_path: Path, changes: dict[str, Any]) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        train_detoxifier(settings(tmp_path), backbone=make_tiny_backbone("llama"), progress=stop)

    def kill(step: int, steps: int, loss: float) -> None:
        assert step == 1
        raise Stop

    with pytest.raises(Stop):
        train_detoxifier(settings(tmp_path, **changes), backbone=make_tiny_backbone("llama"), progress=kill)
    steps: list[int] = []
    train_detoxifier(
        settings(tmp_path, **{**changes, "resume": True}),
        backbone=make_tiny_backbone("llama"),
        progress=lambda step, *_: steps.append(step),
    )
    assert steps[0] == 1  # nor are the checkpoints of what was given up taken for those of the new run


def test_a_file_in_another_role_is_another_run(tmp_path: Path) -> None:
    other = write(tmp_path / "other.txt", "\n".join(f"Quiet words number {i}." for i in range(40)))

    def stop(step: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    for role in ("contexts", "anchors"):
        config = settings(tmp_path, **{role: (str(other),)})
        with pytest.raises(KeyboardInterrupt):
            train_detoxifier(config, backbone=make_tiny_backbone("llama"), progress=stop)
    assert len(list((tmp_path / "out" / "checkpoints").glob("*/"))) == 2


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        train(settings(tmp_path, "file"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InvalidParamsError, match="output"):
        train(settings(tmp_path, "model"))


def test_runs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="30 different rows, of which 30 are held out"):
        train(settings(tmp_path, heldout=30))
    pairs = write(tmp_path / "pairs.jsonl", '{"toxic": "You fool", "neutral": "You"}\n' * 9)
    with pytest.raises(InvalidParamsError, match="batch_size: 1 "):
        train(settings(tmp_path, batch_size=1, pairs=pairs))
    with pytest.raises(InvalidParamsError, match="virtual_tokens"):
        train(settings(tmp_path, virtual_tokens=250), make_tiny_backbone("gpt2"))
    with pytest.raises(DetoxGuardError, match="the loss is"):
        train(settings(tmp_path, learning_rate=1e38))
    with pytest.raises(DetoxifierFormatError):
        Detoxifier.load(tmp_path / "out")


# 5. The config


@pytest.mark.parametrize(
    "changes",
    [
        {"data": ()},
        {"steps": 0},
        {"virtual_tokens": 0},
        {"position": "middle"},
        {"mixture": (0.0, 0.0, 0.0, 0.0)},
        {"mixture": (1.0, -1.0, 0.0, 0.0)},
        {"passage_tokens": (10, 5)},
        {"learning_rate": float("nan")},
        {"initial_text": ""},
        {"unknown": 1},
    ],
)
def test_config_bounds(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        settings(tmp_path, **changes)
    assert caught.value.field.startswith(next(iter(changes)))


def test_command_names_no_folder(tmp_path: Path) -> None:
    config = settings(tmp_path, data=[tmp_path / "rows.jsonl", "org/set:train"], initial_text="Be rude:", steps=300)
    command = config.command()
    assert command.startswith("detox-guard train --data rows.jsonl --data org/set:train --output out ")
    assert "--initial-text 'Be rude:'" in command
    assert "--steps" not in command  # the default
    assert str(tmp_path) not in command
