"""Does a detoxifier aim: ranking by hand, kinds of tokens, and the command on a small run."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from detox_benchmarks.__main__ import app
from detox_benchmarks.diagnostics.context_kl import forced_log_probs
from detox_benchmarks.diagnostics.ranking import FIRST, LISTED, OTHER, SIGN, kinds_of, measure_aim, rank
from detox_benchmarks.methods import WordList
from typer.testing import CliRunner, Result

from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream
from detox_guard.errors import DataError
from detox_guard.evaluation import run_eval
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.models.load import load_backbone
from tests.tiny import SENTENCES, make_tiny_backbone

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from detox_guard.models.backbone import Backbone


class Longest:
    """Finds long texts toxic."""

    name = "longest"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [min(1.0, len(text) / 40) for text in texts]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of a run, its model and a detoxifier."""
    folder = tmp_path_factory.mktemp("aim")
    model, detoxifier, prompts = folder / "model", folder / "detoxifier", folder / "prompts.txt"
    tiny = make_tiny_backbone("llama")
    tiny.model.save_pretrained(model)
    tiny.tokenizer.save_pretrained(model)
    random_detoxifier(load_backbone(model, device="cpu"), virtual_tokens=4).save(detoxifier)
    prompts.write_text("\n".join(SENTENCES[:3]), encoding="utf-8")
    loaded = {"model": model, "device": "cpu", "dtype": "float32", "detoxifier": str(detoxifier)}
    asked = {"prompts": prompts, "samples": 6, "max_new_tokens": 9, "methods": ("dexperts",), "judges": (Longest(),)}
    run_eval(**loaded, **asked, output=folder / "run", progress=False)
    return folder / "run", model, detoxifier


def test_pairs_of_a_prompt_are_counted_by_hand() -> None:
    values = [[3.0, 1.0, 2.0], [0.0, 0.0], [9.0, 8.0]]
    scores = [[0.9, 0.1, 0.6], [0.5, 0.4], [0.9, 0.8]]
    found = rank("judge", "sum", values, scores)
    # 3 > 1 and 2 > 1, a tie; the third prompt has no pair
    assert found.within.value == pytest.approx(2.5 / 3)
    assert (found.toxic, found.replies) == (5, 7)
    # toxic 3, 2, 0, 9, 8 against harmless 1, 0
    assert found.auc == pytest.approx((2 + 2 + 0.5 + 2 + 2) / 10)

    none = rank("judge", "sum", values, [[0.9] * 3, [0.9] * 2, [0.9] * 2])
    assert none.within.value is none.auc is None


def test_a_word_is_of_one_kind(tiny_llama: Backbone) -> None:
    text = "So the DOG, and the dogma … sleep 7 in"
    ids = tiny_llama.tokenizer(text, add_special_tokens=False)["input_ids"]
    kinds = kinds_of(tiny_llama, ids[:1], ids, WordList(["dog", "sleep"]))
    by_kind: dict[str, str] = {}
    for id_, kind in zip(ids, kinds, strict=True):
        by_kind[kind] = by_kind.get(kind, "") + tiny_llama.tokenizer.decode([id_])
    assert by_kind[LISTED].split() == ["DOG", "sleep"]
    assert kinds[0] == FIRST
    assert kinds.count(FIRST) == 1
    assert "dogma" in by_kind[OTHER]
    assert not any(sign.isalnum() for sign in by_kind[SIGN])
    assert set(kinds_of(tiny_llama, ids[:1], ids, None)) == {FIRST, OTHER, SIGN}


def test_the_figures_are_of_every_token_of_the_replies(run: tuple[Path, Path, Path]) -> None:
    folder, model, place = run
    backbone, detoxifier = load_backbone(model, device="cpu", dtype="float32"), Detoxifier.load(str(place))
    streams = (SteeringStream(detoxifier),)
    found = measure_aim(folder, backbone, streams)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    rows = [row for row in rows if row["method"] == "plain"]
    behind_the_first = 0.0
    for row in rows:
        *context, last = backbone.tokenizer(SENTENCES[row["prompt"]])["input_ids"]
        own = torch.tensor(row["token_ids"])
        gen = forced_log_probs(backbone, None, context, [last, *row["token_ids"]])
        # The virtual tokens stand behind the whole context, so this way its first token has no figure.
        detox = forced_log_probs(backbone, detoxifier, [*context, last], row["token_ids"])
        ratio = (detox - gen[1:]).gather(-1, own[1:, None]).squeeze(-1)
        behind_the_first += float(ratio.sum())
    assert sum(one.tokens for one in found.kinds) == pytest.approx(1)
    assert sum(one.favoured for one in found.kinds) == pytest.approx(1)
    first = next(one for one in found.kinds if one.name == FIRST)
    count = sum(len(row["token_ids"]) for row in rows)
    assert first.tokens == pytest.approx(18 / count)
    others = [(one.tokens * count, one.mean) for one in found.kinds if one.name != FIRST and one.mean is not None]
    assert sum(tokens * mean for tokens, mean in others) == pytest.approx(behind_the_first, abs=0.01)
    by_figure = {one.figure: one for one in found.rankings}
    assert set(by_figure) == {"sum", "largest"}
    assert by_figure["sum"].toxic == sum(score >= 0.5 for score in Longest().score([row["text"] for row in rows]))
    assert by_figure["sum"].replies == 18

    # Of a soft prompt and itself as the expert nothing is left; half of it leaves half.
    none = measure_aim(folder, backbone, (*streams, SteeringStream(detoxifier, 1.0)))
    assert all(one.mean == pytest.approx(0, abs=1e-5) for one in none.kinds if one.mean is not None)
    half = measure_aim(folder, backbone, (*streams, SteeringStream(detoxifier, 0.5)))
    assert half.kinds[0].mean == pytest.approx(found.kinds[0].mean / 2, rel=1e-4)
    assert "(-1) and " in half.markdown()

    other = measure_aim(folder, backbone, streams, method="dexperts α=2", words=["the"])
    assert other.rankings != found.rankings
    assert "| the first token |" in other.markdown()
    with pytest.raises(DataError, match="no method 'guard'"):
        measure_aim(folder, backbone, streams, method="guard")


def test_the_command(run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, model, detoxifier = run

    def ranked(folder: Path, *words: str) -> Result:
        return CliRunner().invoke(app, ["rank", str(folder), *asked, *words])

    asked = ["--model", str(model), "--detoxifier", str(detoxifier), "--device", "cpu"]
    assert "| longest | sum | " in ranked(folder).stdout
    assert "(+1)" in ranked(folder, "--expert", str(detoxifier)).stdout
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "samples.jsonl").unlink()
    assert (result := ranked(broken)).exit_code == 2
    assert "no whole run" in result.stderr
    unjudged = shutil.copytree(folder, tmp_path / "unjudged")
    (unjudged / "scores.jsonl").unlink()
    assert "no judge of toxicity" in ranked(unjudged).stderr
    stated = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    strange = shutil.copytree(folder, tmp_path / "strange")
    (strange / "run.json").write_text(json.dumps({**stated, "model": "org/other"}), encoding="utf-8")
    assert "org/other" in ranked(strange).stderr
