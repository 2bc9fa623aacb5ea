"""Ablations: whole runs on tiny models, what is refused, and the command."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detox_benchmarks.__main__ import app
from detox_benchmarks.ablations.run import run_ablation
from detox_benchmarks.ablations.tables import AblationReport
from detox_benchmarks.ablations.variants import AblationConfig, make_variants
from rich.console import Console
from tiny import SENTENCES, TEXTS, make_tiny_backbone
from typer.testing import CliRunner

from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.evaluation import EvalReport
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.evaluation.methods import Method

# 1. Whole runs


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    data, prompts = tmp_path / "rows.jsonl", tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    rows = [
        {"prompt": {"text": text, "toxicity": 0.9 if i % 2 else 0.1}, "challenging": True}
        for i, text in enumerate(SENTENCES)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": (str(data),), "prompts": str(prompts)}


def ablation(what: str, output: Path, files: dict[str, Any], **changes: Any) -> AblationConfig:
    small: dict[str, Any] = {"steps": 2, "batch_size": 4, "reply_tokens": 8, "heldout": 6}
    shown: dict[str, Any] = {"samples": 2, "max_new_tokens": 5, "limit": 3}
    asked = {**files, **small, **shown}
    if what == "sampling":
        asked = {"prompts": files["prompts"], **shown}
    if what == "placement":
        asked = {"data": files["data"], **small}
    return AblationConfig(what=what, output=str(output), **{**asked, **changes})


def run(config: AblationConfig, **kw: Any) -> dict[str, Any]:
    backbone = kw.pop("backbone", None) or make_tiny_backbone("llama", initializer_range=0.1)
    report = run_ablation(config, backbone=backbone, progress=False)
    folder = Path(config.output)
    assert json.loads((folder / "ablation.json").read_text()) == json.loads(report.to_json())
    assert "\n" not in report.to_json()
    with io.StringIO() as file:
        Console(file=file, width=250).print(report.table())
        shown = file.getvalue()
    table = (folder / "table.md").read_text()
    for one in (*report.summary["variants"], *(name for r in report.summary["runs"] for name in r["methods"])):
        assert one in shown
        assert f"| {one.replace('|', chr(92) + '|')} |" in table
    for block in table.split("\n\n"):  # whole tables: as many cells in each line
        lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert str(folder) not in json.dumps(report.summary)
    assert not list(folder.rglob("*.part"))
    return report.summary


def test_tuning(tmp_path: Path, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    config = ablation("tuning", out, files, steps=12, prompt_rate=0.3, lora_rate=0.05, full_rate=0.01, lora_rank=2)
    backbone = make_tiny_backbone("llama", initializer_range=0.1)
    kept = copy.deepcopy(backbone.model.state_dict())
    summary = run(config, backbone=backbone)
    assert all(torch.equal(backbone.model.state_dict()[name], tensor) for name, tensor in kept.items())
    names = ["prompt tuning", "LoRA, rank 2", "full fine-tuning"]
    assert list(summary["variants"]) == names
    prompt, lora, full = summary["variants"].values()
    hidden, everything = backbone.hidden_size, sum(p.numel() for p in backbone.model.parameters())
    assert [one["trained_parameters"] for one in (prompt, full)] == [20 * hidden, everything]
    assert full["bytes"] == {"training": 16 * everything, "serving": 4 * everything}
    assert lora["trained_parameters"] == sum(
        2 * sum(layer.weight.shape)
        for name, layer in backbone.model.named_modules()
        if name.endswith("_proj") and "attn" in name
    )
    for one in (prompt, lora, full):
        assert one["heldout_loss_after"] < one["heldout_loss_before"]
        assert one["training_s"] > 0
        assert (one["rows"], one["passes"]) == (24, 2.0)
    assert lora["heldout_loss_before"] == full["heldout_loss_before"]  # the plain backbone's
    assert Detoxifier.load(out / "prompt-tuning").sha256 == prompt["sha256"] == summary["detoxifiers"][0]
    assert [one["learning_rate"] for one in (prompt, lora, full)] == [0.3, 0.05, 0.01]

    (measured,) = summary["runs"]
    assert (measured["prompts"], measured["prompt_class"]) == (3, "toxic")
    assert list(measured["methods"]) == ["plain", *(f"{name} α=2" for name in names)]
    for name, one in measured["methods"].items():
        figures = one["figures"]
        assert {
            "embedded:expected_max",
            "embedded:probability",
            "backbone:perplexity",
            "distinct_2",
            "degenerate",
        } <= set(figures)
        assert (figures["embedded:expected_max"]["ratio"] is None) == (name == "plain")
        assert (figures["kl_detoxifier"]["value"]["value"] > 0) == (name != "plain")
    rows = [json.loads(line) for line in (out / "eval-1-0.9" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 3 * 2
    assert len({tuple(sorted(row["seed"] for row in rows if row["method"] == n)) for n in measured["methods"]}) == 1
    assert set(EvalReport.load(out / "eval-1-0.9").summary["along"]) == set(measured["methods"])
    assert summary["versions"]["peft"]
    assert summary["settings"]["data"] == ["rows.jsonl"]

    # taken up again: nothing is trained or decoded twice
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("was done already")

    monkeypatch.setattr("detox_guard.training.trainer.train_detoxifier", never)
    monkeypatch.setattr("detox_benchmarks.ablations.training.train_weights", never)
    monkeypatch.setattr(Method, "decode_all", never)
    monkeypatch.setattr("detox_benchmarks.ablations.two_models.decode_pair", never)
    again = run(config)
    assert again["variants"] == summary["variants"]
    assert again["runs"] == summary["runs"]
    with pytest.raises(DataError, match="other settings"):
        run(config.replace(steps=3))
    with pytest.raises(DataError, match="another samples"):
        run(config.replace(samples=3))


def test_a_run_that_was_cut_off(tmp_path: Path, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is whole is kept, what is not is done again, and the result is that of a run that was not cut off."""
    whole = run(ablation("tuning", tmp_path / "whole", files))
    config = ablation("tuning", tmp_path / "out", files)

    def cut(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("detox_benchmarks.ablations.training.train_weights", cut)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert [path.parent.name for path in (tmp_path / "out").rglob("variant.json")] == ["prompt-tuning"]
    stamp = (tmp_path / "out" / "prompt-tuning" / "variant.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("detox_benchmarks.ablations.two_models.decode_pair", cut)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert not (tmp_path / "out" / "ablation.json").exists()
    summary = run(config)
    assert (tmp_path / "out" / "prompt-tuning" / "variant.json").stat().st_mtime_ns == stamp
    assert summary["runs"] == whole["runs"]
    for name, one in summary["variants"].items():
        assert {**one, "training_s": 0} == {**whole["variants"][name], "training_s": 0}


def test_tokens(tmp_path: Path, files: dict[str, Any]) -> None:
    config = ablation("tokens", tmp_path / "out", files, virtual_tokens=(2, 5), alphas=(1.0, 3.0))
    summary = run(config)
    hidden = make_tiny_backbone("llama").hidden_size
    assert {name: one["trained_parameters"] for name, one in summary["variants"].items()} == {
        "2 tokens": 2 * hidden,
        "5 tokens": 5 * hidden,
    }
    assert list(summary["runs"][0]["methods"]) == [
        "plain",
        "2 tokens α=1",
        "2 tokens α=3",
        "5 tokens α=1",
        "5 tokens α=3",
    ]
    more = run(config.replace(virtual_tokens=(2, 5, 7)))  # a run takes more of the same
    assert {name: more["variants"][name] for name in summary["variants"]} == summary["variants"]
    assert set(more["runs"][0]["methods"]) - set(summary["runs"][0]["methods"]) == {"7 tokens α=1", "7 tokens α=3"}


def test_initial_text(tmp_path: Path, files: dict[str, Any]) -> None:
    """The loss before is that of the text itself."""
    texts = ("What a mess! It makes no sense at all.", "text", "a|b\nc")
    summary = run(ablation("initial-text", tmp_path / "out", files, initial_texts=texts, steps=1))
    assert list(summary["variants"])[:2] == [f'"{text}"' for text in texts[:2]]
    assert len({one["heldout_loss_before"] for one in summary["variants"].values()}) == 3


def test_size(tmp_path: Path, files: dict[str, Any]) -> None:
    """As many rows as there are, when some are held out by all and some more by a training; measured on the same."""
    summary = run(ablation("size", tmp_path / "out", files, rows=(5, 2000, 8000)))
    assert {name: one["rows"] for name, one in summary["variants"].items()} == {"5 rows": 5, "18 rows": 18}
    assert len({one["heldout_loss_before"] for one in summary["variants"].values()}) == 1
    assert Detoxifier.load(tmp_path / "out" / "rows-5").card.data[0].rows == 5 + 6
    used = {
        json.loads(line)["text"]
        for path in (tmp_path / "out").rglob("rows.jsonl")
        for line in path.read_text().splitlines()
    }
    _, heldout = make_variants(ablation("size", tmp_path / "out", files), TEXTS)
    assert not used & set(heldout)
    with pytest.raises(DataError, match="held out"):
        run(ablation("size", tmp_path / "other", files, heldout=15))


def test_sampling(tmp_path: Path, files: dict[str, Any]) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.1)
    random_detoxifier(backbone, virtual_tokens=4).save(tmp_path / "noise")
    config = ablation(
        "sampling", tmp_path / "out", files, detoxifier=str(tmp_path / "noise"), alphas=(1.0, 2.0), top_ps=(0.8,)
    )
    summary = run(config, backbone=backbone)
    assert summary["variants"] == {}
    assert len(summary["detoxifiers"]) == 1
    assert [(one["temperature"], one["top_p"]) for one in summary["runs"]] == [(0.7, 0.8), (1.0, 0.8)]
    for one in summary["runs"]:
        assert list(one["methods"]) == ["plain", "dexperts α=1", "dexperts α=2"]
    cold, warm = (
        one["methods"]["plain"]["figures"]["backbone:perplexity"]["value"]["value"] for one in summary["runs"]
    )
    assert cold != warm  # each has a plain of its own


def test_placement(tmp_path: Path, files: dict[str, Any]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"toxic": one, "neutral": one[::-1]}) + "\n" for one in TEXTS[:6]))
    backbone = make_tiny_backbone("llama")
    random_detoxifier(backbone, virtual_tokens=4).save(tmp_path / "noise")
    asked = {"passage_tokens": (30, 60), "pairs": str(pairs), "detoxifier": str(tmp_path / "noise"), "limit": 4}
    asked |= {"prompts": files["prompts"], "samples": 2, "max_new_tokens": 5}
    config = ablation("placement", tmp_path / "out", files, **asked)
    summary = run(config, backbone=backbone)
    contexts = ["bare", "chat", "behind 30 tokens", "behind 60 tokens"]
    assert [one["context"] for one in summary["runs"]] == contexts
    assert [list(one["methods"]) for one in summary["runs"]] == [
        ["plain", "front α=2", "reply α=2", "as given α=2"]
    ] * 4
    perplexities = [
        one["methods"]["plain"]["figures"]["backbone:perplexity"]["value"]["value"] for one in summary["runs"]
    ]
    assert len(set(perplexities)) == 4  # each context is really there
    assert all(context in (tmp_path / "out" / "table.md").read_text() for context in contexts)
    assert list(summary["context_kl"]) == ["front", "reply", "as given"]
    assert list(summary["variants"]) == ["front", "reply"]
    for place in ("front", "reply"):
        found = summary["context_kl"][place]
        assert found["position"] == place
        assert [one["setting"] for one in found["settings"]] == [
            "bare",
            "chat",
            "chat + 30-token passage",
            "chat + 60-token passage",
        ]
        assert all(one["kl"] > 0 for one in found["settings"])
        assert {one["aim"] for one in found["settings"]} <= {0, 0.25, 0.5, 0.75, 1}  # of four pairs
    assert summary["detoxifiers"] == [one["detoxifier_sha256"] for one in summary["context_kl"].values()]
    assert "toxic less neutral" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(InvalidParamsError, match="passage_tokens"):
        run(ablation("placement", tmp_path / "other", files))  # 2,000 tokens are more than the tiny model has


# 2. What is refused, and the command line


def test_rows_that_follow_something_are_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    data = tmp_path / "asked.jsonl"
    data.write_text(json.dumps({"question": "How so?", "text": TEXTS[0]}) + "\n")
    with pytest.raises(DataError, match="a prompt or a question"):
        run(ablation("tuning", tmp_path / "out", {**files, "data": (str(data),)}))


@pytest.mark.parametrize(
    ("what", "changes", "field"),
    [
        ("tuning", {"data": ()}, "data"),
        ("tokens", {"prompts": None}, "prompts"),
        ("tokens", {"initial_texts": ("one",)}, "initial_texts"),
        ("sampling", {"steps": 5}, "steps"),
        ("placement", {"position": "front"}, "position"),
        ("placement", {"alphas": (1.0,)}, "alphas"),
        ("placement", {"judges": ("other",)}, "judges"),
        ("size", {"lora_rank": 2}, "lora_rank"),
        ("tuning", {"detoxifier": "folder"}, "detoxifier"),
        ("tokens", {"pairs": "file"}, "pairs"),
        ("tokens", {"virtual_tokens": (0,)}, "virtual_tokens"),
        ("tokens", {"virtual_tokens": (5, 5000)}, "virtual_tokens"),
        ("tuning", {"alphas": (0.0,)}, "alphas"),
        ("tuning", {"mixture": (0.0, 0.0, 0.0, 0.0)}, "mixture"),
        ("other", {}, "what"),
    ],
)
def test_refused_before_loading(
    tmp_path: Path, files: dict[str, Any], what: str, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidParamsError, match=field):
        run_ablation(ablation(what, tmp_path / "out", files, model="no/such-model", **changes), progress=False)
    assert not list(tmp_path.glob("out/*/*"))


def test_files_are_read_before_loading(tmp_path: Path, files: dict[str, Any]) -> None:
    calm = tmp_path / "calm.jsonl"
    calm.write_text(json.dumps({"prompt": {"text": "One", "toxicity": 0.1}}))
    for changes, said in (
        ({"data": (str(tmp_path / "absent.jsonl"),)}, "no such file"),
        ({"prompts": str(tmp_path / "absent.jsonl")}, "no such file"),
        ({"prompts": str(calm)}, "no toxic prompt"),
        ({"heldout": 30}, "held out"),
    ):
        with pytest.raises(DataError, match=said):
            run_ablation(ablation("tokens", tmp_path / "out", files, model="no/such-model", **changes), progress=False)


def test_every_setting_has_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[AblationConfig] = []

    def measured(config: AblationConfig) -> AblationReport:
        asked.append(config)
        foot = {"model": "m", "dtype": "float32", "seed": 0, "settings": {}, "machine": {"cpu": "c", "cores": 2}}
        return AblationReport({**foot, "variants": {}, "runs": [], "context_kl": {}})

    monkeypatch.setattr("detox_benchmarks.ablations.run.run_ablation", measured)
    flags = {"alphas": "--alpha", "temperatures": "--temperature", "top_ps": "--top-p", "judges": "--judge"}
    flags |= {"initial_texts": "--initial-text"}
    values: dict[str, Any] = {
        "rule": "detoxigen",
        "position": "front",
        "dtype": "float32",
        "mixture": (1, 0, 0, 0),
        "top_ps": 0.5,
    }
    names = [name for name in AblationConfig.model_fields if name not in {"what", "output"}]
    words = ["ablate", "tuning", "--output", str(tmp_path)]
    for name in names:
        value = values.get(name, 2)
        words += [
            flags.get(name, "--" + name.replace("_", "-")),
            *map(str, value if isinstance(value, tuple) else [value]),
        ]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ablation"]["seed"] == 0
    assert asked[0].model_fields_set == set(AblationConfig.model_fields)
    assert CliRunner().invoke(app, ["ablate", "tuning", "--output", str(tmp_path)]).exit_code == 0
    assert asked[1].model_fields_set == {"what", "output"}
    assert CliRunner().invoke(app, ["ablate", "tuning", "--output", str(tmp_path), "--steps", "0"]).exit_code == 2
