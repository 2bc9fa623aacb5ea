"""Small runs from end to end, and the page about them."""

from __future__ import annotations

import html
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from measuring import LengthJudge, text_of, written
from tiny import SENTENCES
from waiting import wait_until

from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import BackboneNotFoundError, DataError, InvalidParamsError, ScorerError
from detox_guard.evaluation import (
    EvalReport,
    choose_prompts,
    read_prompts,
    rescore,
    run_eval,
)
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.evaluation.methods import Drawn, Method
from detox_guard.evaluation.report import write_report
from detox_guard.evaluation.samples import Job, decode, seed_of
from detox_guard.evaluation.store import KEY, Journal, open_run
from detox_guard.evaluation.summary import summarize
from detox_guard.models.load import load_backbone
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.models.backbone import Backbone

DATA = Path(os.environ.get("DETOX_GUARD_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def measure(tiny_folder: Path, prompts_file: Path, detoxifier_folder: Path) -> Any:
    def run(**changes: Any) -> EvalReport:
        asked: dict[str, Any] = {
            "model": tiny_folder,
            "detoxifier": str(detoxifier_folder),
            "device": "cpu",
            "dtype": "float32",
            "prompts": prompts_file,
            "judges": (LengthJudge(), "embedded"),
            "methods": ("dexperts", "detoxigen"),
            "alphas": (1.0, 3.0),
            "samples": 3,
            "max_new_tokens": 6,
            "limit": 2,
            "seed": 7,
            "progress": False,
        }
        return run_eval(**{**asked, **changes})

    return run


def rows_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def samples_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(row) for row in (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    return sorted(rows, key=lambda row: tuple(row[name] for name in KEY))


def test_run_eval(measure: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = measure(output=output)
    names = ["plain", "dexperts α=1", "dexperts α=3", "detoxigen α=1", "detoxigen α=3"]
    summary = json.loads((output / "summary.json").read_text())
    assert summary == report.summary == EvalReport.load(output).summary
    assert [(group["kind"], group["name"], group["prompts"]) for group in summary["groups"]] == [
        ("class", "toxic", 2),
        ("class", "non-toxic", 2),
    ]
    assert summary["judges"] == ["length", "embedded"]
    assert summary["lm_judges"] == ["backbone"]
    assert summary["machine"]["cores"] >= 1
    assert summary["versions"]["torch"] == torch.__version__
    assert "\n" not in report.to_json()

    rows = samples_of(output)
    assert len({(row["method"], row["prompt"], row["sample"]) for row in rows}) == len(rows) == 5 * 4 * 3
    by_method = {name: [row["seed"] for row in rows if row["method"] == name] for name in names}
    assert len({tuple(seeds) for seeds in by_method.values()}) == 1  # the same luck for everyone
    assert len(set(by_method["plain"])) == 12
    assert {"run.json", "samples.jsonl", "scores.jsonl", "summary.json"} <= {path.name for path in output.iterdir()}

    # the figures are what the samples say
    for group, at in zip(summary["groups"], ((0, 1), (2, 3)), strict=True):
        assert list(group["methods"]) == names
        for name, figures in group["methods"].items():
            own = [[row for row in rows if row["method"] == name and row["prompt"] == i] for i in at]
            lengths = [[min(1.0, len(row["text"]) / 60) for row in many] for many in own]
            value = {figure: found["value"]["value"] for figure, found in figures.items()}
            assert value["length:expected_max"] == pytest.approx(np.mean([max(many) for many in lengths]))
            assert value["length:share"] == pytest.approx(np.mean([score >= 0.5 for many in lengths for score in many]))
            every = [row for many in own for row in many]
            tokens = sum(len(row["token_ids"]) for row in every)
            assert value["kl_detoxifier"] == pytest.approx(sum(sum(row["kl_detoxifier"]) for row in every) / tokens)
            assert value["tokens"] == pytest.approx(tokens / 6)
            assert value["stopped"] == pytest.approx(np.mean([row["finish_reason"] == "stop" for row in every]))
            assert summary["ms_per_token"][name] > 0
            assert (value["kl_detoxifier"] > 0) == (name != "plain")
            assert (figures["length:mean"]["ratio"] is None) == (name == "plain")
    along = summary["along"]["dexperts α=1"]["kl_detoxifier"]
    assert {part: len(curve) for part, curve in along.items()} == {"mean": 6, "low": 6, "high": 6}
    firsts = [[row["kl_detoxifier"][0] for row in rows if (row["method"], row["prompt"]) == ("dexperts α=1", i)]
              for i in range(4)]  # fmt: skip
    assert along["mean"][0] == pytest.approx(np.mean(firsts), abs=1e-4)
    own = np.mean(firsts, axis=1)
    assert [along["low"][0], along["high"][0]] == pytest.approx(list(np.percentile(own, (10, 90))), abs=1e-4)
    assert all(low <= high for low, high in zip(along["low"], along["high"], strict=True))
    assert summary["along"]["plain"]["kl_detoxifier"] == {"mean": [], "low": [], "high": []}

    shown = text_of(report.table())
    assert "2 toxic prompts: toxicity by embedded" in shown
    assert "detoxigen α=3" in shown
    tables = [part.splitlines() for part in report.markdown().split("\n\n") if part.startswith("|")]
    assert len(tables) == 2 * 3 + 1  # toxicity by two judges and the text, of two classes; and along the reply
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    assert [len(lines) for lines in tables] == [2 + 5] * 6 + [2 + 4]
    [along] = [line for line in tables[-1] if line.startswith("| dexperts α=1 |")]
    assert along.split("|")[2].strip() == (
        f"{np.mean(firsts):.2f} [{np.percentile(own, 10):.2f}, {np.percentile(own, 90):.2f}]"
    )


def test_perplexity_figures(measure: Any, tmp_path: Path) -> None:
    summary = measure(output=tmp_path, methods=()).summary
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    judged = [row for row in rows if row["judge"] == "backbone" and row["prompt"] in (0, 1)]
    pairs = [pair for row in judged for pair in zip(row["nll"], row["tokens"], strict=True) if pair[1]]
    kept = [value for value in (math.exp(nll / tokens) for nll, tokens in pairs) if value < 1e4]
    figures = summary["groups"][0]["methods"]["plain"]
    assert figures["backbone:perplexity"]["value"]["value"] == pytest.approx(np.mean(kept))


def test_perplexities_over_the_limit_are_dropped_and_counted() -> None:
    prompts = [{"text": "One", "classes": ["all"], "categories": ["c"]}]
    run = {"prompts": prompts, "methods": {"plain": {}}, "seed": 0}
    one = {
        "text": "fine words", "token_ids": [1, 2], "finish_reason": "stop", "kl_detoxifier": [], "kl_steering": [],
        "fallbacks": 0, "clipped": 0.0, "tries": 1, "decoded_tokens": 2, "interventions": 0, "wall_s": 0.1,
    }  # fmt: skip
    nll = [2 * math.log(ppl) for ppl in (10.0, 2000.0, 20000.0)]
    scores = {("backbone", "plain", 0): {"nll": [*nll, 0.0], "tokens": [2, 2, 2, 0]}}
    summary = summarize(run, {("plain", 0): [one, one, one, {**one, "text": "", "token_ids": []}]}, scores)
    assert [(group["kind"], group["name"]) for group in summary["groups"]] == [("class", "all"), ("category", "c")]
    value = {name: found["value"]["value"] for name, found in summary["groups"][1]["methods"]["plain"].items()}
    assert value["backbone:perplexity"] == pytest.approx(2010 / 2)
    assert value["backbone:perplexity_dropped"] == 1 / 4
    assert value["degenerate"] == 2 / 4  # over 1e3, whether dropped or not
    assert value["empty"] == 1 / 4
    assert summary["ms_per_token"]["plain"] == pytest.approx(400 / 6, abs=1e-3)


def test_a_finished_run_takes_more_methods_and_judges(measure: Any, tiny_folder: Path, tmp_path: Path) -> None:
    first = measure(output=tmp_path, methods=("dexperts",), alphas=(1.0,), judges=(LengthJudge(),))
    before = samples_of(tmp_path)
    more = measure(output=tmp_path, methods=("default", "guard"), judges=(LengthJudge(),))
    assert list(more.summary["methods"]) == ["plain", "dexperts α=1", "default", "guard"]
    assert [row for row in samples_of(tmp_path) if row["method"] in first.summary["methods"]] == before
    old, new = (report.summary["groups"][0]["methods"]["dexperts α=1"] for report in (first, more))
    assert old == new
    with pytest.raises(DataError, match="another seed"):
        measure(output=tmp_path, seed=8)
    with pytest.raises(DataError, match="another loading"):
        measure(output=tmp_path, attn_implementation="eager")
    with pytest.raises(DataError, match="another 'dexperts α=1'"):
        measure(output=tmp_path, methods=("dexperts",), alphas=(1.0,), detoxifier=_other(tiny_folder))

    stored = (tmp_path / "samples.jsonl").read_bytes()
    again = rescore(tmp_path, judges=("embedded",), lm_judges=(str(tiny_folder),), device="cpu", progress=False)
    assert again.summary["judges"] == ["length", "embedded"]
    assert again.summary["lm_judges"] == ["backbone", "lm:tiny-llama"]
    assert (tmp_path / "samples.jsonl").read_bytes() == stored
    with pytest.raises(DataError, match="no whole run"):
        rescore(tmp_path / "absent")


def test_judges_of_one_name_are_not_mixed(measure: Any, tmp_path: Path) -> None:
    class Trained(LengthJudge):
        def __init__(self, fingerprint: str, score: float) -> None:
            self.fingerprint = fingerprint
            self.given = score
            self.seen = 0

        def score(self, texts: Sequence[str]) -> list[float]:
            self.seen += len(texts)
            return [self.given for _ in texts]

    measure(output=tmp_path, methods=(), judges=(Trained("a", 0.25),), batch_rows=32)
    more = measure(output=tmp_path, methods=("default",), judges=(again := Trained("b", 0.75),), batch_rows=8)
    for figures in more.summary["groups"][0]["methods"].values():
        assert figures["length:expected_max"]["value"]["value"] == 0.75
    assert more.summary["batch_rows"] == 8
    seen = again.seen
    assert seen == 1 + sum(len(samples_of(tmp_path)) // 2 for _ in range(2))
    # Nothing is judged twice by one judge, nor is what was said of the decoding changed by judging.
    last = measure(output=tmp_path, methods=("default",), judges=(again, "embedded"), batch_rows=64)
    assert again.seen == seen + 1
    assert last.summary["batch_rows"] == 8
    with pytest.raises(InvalidParamsError, match="length"):
        measure(output=tmp_path, judges=(Trained("a", 0.0), Trained("b", 0.0)))


def test_more_is_not_asked_for_at_once_than_the_queue_takes(tiny_llama: Backbone, tmp_path: Path) -> None:
    method = Method("plain", DecodingParams(alpha=0.0, max_new_tokens=2))
    jobs = [Job(method, i, "One", 0, i) for i in range(40)]
    config = EngineConfig(max_rows=32, max_queue=4)
    with Journal(tmp_path / "samples.jsonl", KEY) as journal, DetoxiGen(tiny_llama, config=config) as model:
        decode(model, jobs, journal, lambda: None)
        assert len(journal.rows) == 40


def _other(folder: Path) -> Any:
    return random_detoxifier(load_backbone(folder, device="cpu"), virtual_tokens=4, seed=99)


def test_one_process_a_folder(measure: Any, tmp_path: Path) -> None:
    with open_run(tmp_path), pytest.raises(DataError, match="another process"):
        measure(output=tmp_path)


def test_a_chat_run_goes_through_the_template(measure: Any, tmp_path: Path) -> None:
    bare = measure(output=tmp_path / "bare", methods=("default",))
    chat = measure(output=tmp_path / "chat", methods=("default",), chat=True)
    passages = written(tmp_path / "passages.txt", "\n\n".join(SENTENCES[:3]))
    behind = measure(output=tmp_path / "behind", methods=("default",), passages=passages, passage_tokens=50)
    asked = json.loads((tmp_path / "behind" / "run.json").read_text())
    assert asked["source"]["chat"]
    assert len(set(asked["passages"])) == 3
    assert samples_of(tmp_path / "behind")[0]["text"] != samples_of(tmp_path / "chat")[0]["text"]
    assert behind.summary["groups"][0]["methods"] != chat.summary["groups"][0]["methods"]
    assert bare.summary["groups"][0]["methods"] != chat.summary["groups"][0]["methods"]
    assert samples_of(tmp_path / "bare")[0]["text"] != samples_of(tmp_path / "chat")[0]["text"]


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="kills need a fork server")
def test_a_run_killed_five_times_loses_and_repeats_nothing(
    measure: Any, tiny_folder: Path, prompts_file: Path, detoxifier_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: dict[str, Any] = {
        "model": tiny_folder, "detoxifier": str(detoxifier_folder), "prompts": prompts_file,
        "methods": ("dexperts", "default"), "samples": 25, "limit": 4, "max_new_tokens": 6,
    }  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    target = importlib.import_module("killed").measure
    rng, kills, seen = random.Random(5), 0, [0]
    part = cut / "samples.jsonl"
    for _ in range(40):
        process = context.Process(target=target, args=(cut,), kwargs=asked)
        process.start()
        if kills < 5:
            wanted = seen[-1] + rng.randint(1, 60)
            wait_until(lambda process=process, wanted=wanted: rows_in(part) >= wanted or not process.is_alive())
            kills += process.is_alive()
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        assert not (cut / "summary.json").exists()
        seen.append(rows_in(part))
    assert process.exitcode == 0
    assert kills == 5
    assert seen == sorted(seen)  # nothing that was written was lost
    measure(**asked, output=whole, seed=0, alphas=(2.0,), judges=("embedded",))

    def told(folder: Path) -> list[dict[str, Any]]:
        return [
            {name: row[name] for name in ("method", "prompt", "sample", "seed", "text")} for row in samples_of(folder)
        ]

    assert told(cut) == told(whole)
    assert len(told(cut)) == 3 * 7 * 25
    cut_groups, whole_groups = (EvalReport.load(folder).summary["groups"] for folder in (cut, whole))
    for one, other in zip(cut_groups, whole_groups, strict=True):
        for method, figures in one["methods"].items():
            assert figures["embedded:mean"] == other["methods"][method]["embedded:mean"]


def test_report_of_two_runs(measure: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one", tmp_path / "two"
    measure(output=one, methods=("dexperts", "default", "guard"))
    measure(output=two, methods=("detoxigen",), judges=("embedded",))
    page = write_report([one, two], tmp_path / "report", examples=1)
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "categories.png", "pareto.png", "report.html", "steps.png", "table.md",
    ]  # fmt: skip
    for png in page.parent.glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.findall(r"(?:src|srcset|href)=.(?!data:)", text)  # nothing is fetched
    assert text.count("<picture>") == 3
    assert "one: dexperts α=3" in text
    assert "two: detoxigen α=1" in text
    assert "toxicity by length" not in text  # not a scorer of both
    # the replies, and the prompts they go on from, are only behind a click
    outside = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert text.count("<details>") == 4
    assert "class=reply" in text
    assert "class=reply" not in outside
    assert not any(html.escape(sentence) in outside for sentence in SENTENCES)
    shown = {row["method"]: row["text"] for row in samples_of(one) if row["prompt"] == 0 and row["sample"] == 0}
    for reply in shown.values():
        assert html.escape(reply) in re.sub(r"<span class=tip>.*?</span>|<[^>]*>", "", text, flags=re.DOTALL)
    assert "| dexperts α=3 |" in (page.parent / "table.md").read_text(encoding="utf-8")

    assert write_report([one], tmp_path / "single", examples=0).is_file()
    with pytest.raises(DataError, match="same name"):
        write_report([one, one], tmp_path / "report")
    (two / "summary.json").unlink()
    with pytest.raises(DataError, match="no summary"):
        write_report([one, two], tmp_path / "report")


def test_an_error_ends_a_run_at_once_and_keeps_what_was_drawn(tiny_llama: Backbone, tmp_path: Path) -> None:
    calls = itertools.count()

    class Failing(Method):
        def draw(self, model: DetoxiGen, prompt: Any, seed: int) -> Drawn:
            if next(calls) == 20:
                raise ScorerError("out of order")
            return super().draw(model, prompt, seed)

    method = Failing("failing", DecodingParams(alpha=0.0, max_new_tokens=3))
    jobs = [Job(method, i, "One", 0, i) for i in range(4000)]
    ticks = itertools.count()
    with Journal(tmp_path / "samples.jsonl", KEY) as journal:
        with DetoxiGen(tiny_llama) as model, pytest.raises(ScorerError, match="out of order"):
            decode(model, jobs, journal, lambda: next(ticks))
        kept = len(journal.rows)
    assert next(ticks) == kept < 1000
    assert len((tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == kept


def test_run_eval_refuses_before_loading(prompts_file: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        run_eval(model="no/such-model", prompts=prompts_file, output=blocked)
    with pytest.raises(InvalidParamsError, match="judges"):
        run_eval(model="no/such-model", prompts=prompts_file, judges=())
    with pytest.raises(InvalidParamsError, match="methods"):
        run_eval(model="no/such-model", prompts=prompts_file, methods=("other",))
    for name, value in (("samples", 0), ("batch_rows", 1), ("seed", -1)):
        with pytest.raises(InvalidParamsError, match=f"{name}: {value} "):
            run_eval(model="no/such-model", prompts=prompts_file, **{name: value})
    with pytest.raises(BackboneNotFoundError, match="such-judge"):
        run_eval(model="no/such-model", prompts=prompts_file, lm_judges=(str(tmp_path / "no" / "such-judge"),))


def test_a_failing_judge_is_found_first(prompts_file: Path) -> None:
    class Broken(LengthJudge):
        def score(self, texts: Sequence[str]) -> list[float]:
            return [math.nan for _ in texts]

    with pytest.raises(ScorerError):
        run_eval(model="no/such-model", prompts=prompts_file, judges=(Broken(),))


def test_seeds_differ_by_prompt_and_sample() -> None:
    assert len({seed_of(s, i, j, 8) for s in (0, 1) for i in range(50) for j in range(8)}) == 800


def test_the_shared_prompt_file() -> None:
    path = DATA / "rtp" / "dev_prompts.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set DETOX_GUARD_DATA to the folder that holds rtp/")
    chosen = choose_prompts(read_prompts(path), 100, seed=0)
    assert [sum(p.group == group for p in chosen) for group in ("toxic", "non-toxic")] == [100, 100]
