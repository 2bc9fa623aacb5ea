"""Evaluation: figures against hand-computed ones, files good and bad, and one small run from end to end."""

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
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from measuring import LengthJudge, rtp_row, text_of, written
from tiny import SENTENCES

from detox_guard.detoxifiers.soft_prompt import SteeringStream
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import BackboneNotFoundError, DataError, InvalidParamsError, ScorerError
from detox_guard.evaluation import (
    EvalPrompt,
    EvalReport,
    choose_prompts,
    read_passages,
    read_prompts,
    rescore,
    run_eval,
)
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.evaluation.lms import LMJudge, reply_nll
from detox_guard.evaluation.methods import METHODS, Ingredients, Method, make_methods
from detox_guard.evaluation.metrics import Bootstrap, Interval, distinct_n, junk, repeats, toxicity
from detox_guard.evaluation.report import write_report
from detox_guard.evaluation.samples import Job, decode, seed_of
from detox_guard.evaluation.store import KEY, Journal, open_run
from detox_guard.evaluation.summary import summarize
from detox_guard.evaluation.tables import shown
from detox_guard.models.load import load_backbone
from detox_guard.scorers.base import load_scorer
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.models.backbone import Backbone

DATA = Path(os.environ.get("DETOX_GUARD_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [rtp_row(text, 0.9 if i % 2 else 0.1) for i, text in enumerate(SENTENCES)]
    path.write_text("\n".join([*rows, rtp_row("No label here", None), ""]))
    return path


# --- figures


def test_toxicity_figures_by_hand() -> None:
    scores = np.array([[0.1, 0.9], [0.2, 0.4], [0.5, 0.1], [0.0, 0.0]])
    plain = np.array([[0.8, 0.9], [0.6, 0.4], [0.5, 0.1], [0.4, 0.4]])
    bootstrap = Bootstrap(4)
    own, other = toxicity(scores, bootstrap), toxicity(plain, bootstrap)
    wanted = {"expected_max": 1.8 / 4, "probability": 2 / 4, "share": 2 / 8, "mean": 2.2 / 8}  # .5 itself counts
    assert {name: bootstrap.figure(found).value.value for name, found in own.items()} == pytest.approx(wanted)
    figure = bootstrap.figure(own["expected_max"], other["expected_max"])
    assert figure.ratio is not None
    assert figure.ratio.value == pytest.approx(1.8 / 2.4)
    assert figure.difference is not None
    assert figure.difference.value == pytest.approx((1.8 - 2.4) / 4)
    assert bootstrap.figure(other["mean"]).ratio is None


def test_bootstrap_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        bootstrap = Bootstrap(60, seed=trial, resamples=400)
        interval = bootstrap.figure(bootstrap.rate(rng.beta(2, 5, size=60))).value
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 2 / 7 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_pairs_prompts_and_repeats() -> None:
    plain = np.random.default_rng(2).uniform(0.1, 1.0, 50)
    bootstrap = Bootstrap(50, seed=3)
    # the same cut on every prompt: no spread at all
    ratio = bootstrap.figure(bootstrap.rate(plain * 0.6), bootstrap.rate(plain)).ratio
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.6, 0.6, 0.6))
    assert np.array_equal(bootstrap.rate(plain), Bootstrap(50, seed=3).rate(plain))
    assert not np.array_equal(bootstrap.rate(plain), Bootstrap(50, seed=4).rate(plain))


def test_figures_without_a_denominator_are_undefined() -> None:
    bootstrap = Bootstrap(3)
    nothing = bootstrap.figure(bootstrap.rate([0.1, 0.2, 0.3]), bootstrap.rate([0.0, 0.0, 0.0])).ratio
    assert nothing is not None
    assert (nothing.value, nothing.low, nothing.high) == (None, None, None)
    assert bootstrap.figure(bootstrap.rate([0.0] * 3, [0.0] * 3)).value.value is None


def test_a_bound_that_resamples_do_not_give_is_none() -> None:
    bootstrap = Bootstrap(40)

    def ratio(own: int, plain: int) -> Interval:
        """Of two rates, each of the first so many of 40 prompts."""
        rates = [bootstrap.rate(np.arange(40) < count) for count in (own, plain)]
        found = bootstrap.figure(*rates).ratio
        assert found is not None
        return found

    for own, plain, low, high in (
        (5, 2, 1.0, None),  # one resample in nine divides by zero
        (1, 1, None, None),  # one in three is zero by zero, which may be anything
        (0, 1, None, None),
        (0, 20, 0.0, 0.0),
    ):
        assert ratio(own, plain) == Interval(own / plain, low, high)
    assert shown(asdict(ratio(5, 2)), change=True) == "+150% [+0%, –]"


@pytest.mark.parametrize(
    ("text", "token_ids", "wanted"),
    [
        ("A quiet walk in the park.", range(7), False),
        ("la la la la la", [5, 5, 5, 5, 5], True),
        ("la la la la", [5, 5, 5, 5], False),
        ("on and on and on and on and on and", [1, 2, 1, 2, 1, 2, 1, 2, 1, 2], True),
        ("}{;;<|>?/)(_-", range(8), True),
        ("half a char \ufffd", range(4), True),
        ("今天天气很好，我们去公园散步吧。", range(9), False),
        ("नमस्ते दुनिया", range(9), False),
        ("!!!", range(2), False),
        ("", [], False),
    ],
)
def test_broken_text(text: str, token_ids: Sequence[int], wanted: bool) -> None:
    assert (repeats(token_ids) or junk(text)) is wanted


@pytest.mark.parametrize(
    ("texts", "n", "wanted"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),
        (["a b", "a b"], 2, 1 / 2),
        (["a b c", ""], 3, 1.0),
        (["a", ""], 2, None),
        ([], 1, None),
    ],
)
def test_distinct_n(texts: list[str], n: int, wanted: float | None) -> None:
    assert distinct_n(texts, n) == wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nll_is_the_models_own_loss(kind: str, request: pytest.FixtureRequest) -> None:
    backbone: Backbone = request.getfixturevalue(f"tiny_{kind}")
    prompt = backbone.tokenizer(SENTENCES[0])["input_ids"]
    replies = [backbone.tokenizer(text)["input_ids"] for text in SENTENCES[1:4]]
    nats = reply_nll(backbone, prompt, [*replies, []])
    assert nats[-1] == 0.0
    for reply, ours in zip(replies, nats, strict=False):
        ids = torch.tensor([prompt + reply])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            loss = backbone.model(input_ids=ids, labels=labels).loss
        assert math.exp(ours / len(reply)) == pytest.approx(math.exp(float(loss)), rel=1e-4)


# --- files and judges


def test_likelihoods_do_not_depend_on_the_batch(tiny_llama: Backbone) -> None:
    prompt = tiny_llama.tokenizer(SENTENCES[0])["input_ids"]
    replies = [tiny_llama.tokenizer(SENTENCES[1 + i % 3])["input_ids"][: 3 + i % 5] for i in range(70)]
    together = reply_nll(tiny_llama, prompt, replies)
    alone = [reply_nll(tiny_llama, prompt, [reply])[0] for reply in replies[::9]]
    assert together[::9] == pytest.approx(alone, rel=1e-4)


def test_another_model_judges_in_its_own_tokens(tiny_gpt2: Backbone) -> None:
    judge = LMJudge(tiny_gpt2)
    ids = tiny_gpt2.tokenizer(" kind words")["input_ids"]
    (nats, tokens), empty = judge.judge("So many", [" kind words", ""], [[1], []])
    assert (tokens, empty) == (len(ids), (0.0, 0))
    assert nats == pytest.approx(reply_nll(tiny_gpt2, tiny_gpt2.tokenizer("So many")["input_ids"], [ids])[0])
    assert judge.judge([{"role": "user", "content": "So many"}], [" kind"], [[1]])[0][0] > 0


def test_prompts_are_read_and_chosen_by_label(prompts_file: Path) -> None:
    prompts = read_prompts(prompts_file)
    assert [prompt.text for prompt in prompts] == SENTENCES  # the row without a label is left out
    chosen = choose_prompts(prompts, 2, seed=5)
    assert [prompt.classes for prompt in chosen] == [("toxic",), ("toxic",), ("non-toxic",), ("non-toxic",)]
    assert chosen == choose_prompts(prompts, 2, seed=5)
    assert len({tuple(choose_prompts(prompts, 2, seed=seed)) for seed in range(10)}) > 1
    assert EvalPrompt("at the border", 0.5).group == "toxic"
    with pytest.raises(InvalidParamsError, match="limit"):
        choose_prompts(prompts, 0, seed=5)


def test_challenging_prompts_count_where_they_were_drawn() -> None:
    prompts = [EvalPrompt(f"toxic {i}", 0.9) for i in range(9)] + [EvalPrompt("hard", 0.1, challenging=True)]
    classes = {prompt.text: prompt.classes for prompt in choose_prompts(prompts, 3, seed=0)}
    assert classes.pop("hard") == ("non-toxic", "challenging")
    assert set(classes.values()) == {("toxic",)}
    # a limit that leaves it out of its label's class leaves it in the other
    prompts = [EvalPrompt("hard", 0.9, challenging=True), *(EvalPrompt(f"toxic {i}", 0.9) for i in range(99))]
    drawn = [prompt.classes for prompt in choose_prompts(prompts, 1, seed=1) if prompt.challenging]
    assert drawn == [("challenging",)]


def test_plain_prompts_have_no_label(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('\n{"prompt": "One"}\n\n{"prompt": "Two"}\n')
    assert [(p.text, p.group) for p in read_prompts(path)] == [("One", "all"), ("Two", "all")]


def test_formats_of_prompts(tmp_path: Path) -> None:
    nested = {"text": "One", "toxicity": 0.7, "insult": 0.9, "threat": None, "profanity": 0.49}
    path = written(tmp_path / "rtp.jsonl", json.dumps({"challenging": True, "prompt": nested}))
    assert read_prompts(path) == [EvalPrompt("One", 0.7, challenging=True, categories=("insult",))]

    table = 'id,comment,toxic,category\n1,"Two, and\nmore words",True,talk\n2,Three,False,\n'
    path = written(tmp_path / "table.csv", table)
    assert read_prompts(path) == [
        EvalPrompt("Two, and\nmore words", 1.0, categories=("talk",)),
        EvalPrompt("Three", 0.0),
    ]
    assert [prompt.text for prompt in read_prompts(path, words=2)] == ["Two, and", "Three"]
    assert [prompt.text for prompt in read_prompts(path, field="id")] == ["1", "2"]
    with pytest.raises(DataError, match=r"line 3: no prompt text .no 'body'"):
        read_prompts(path, field="body")
    with pytest.raises(InvalidParamsError, match="words"):
        read_prompts(path, words=0)

    path = written(tmp_path / "lines.txt", "Four \u2028 here\n\n  \nFive\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["Four \u2028 here", "Five"]

    path = written(
        tmp_path / "bold.json", json.dumps({"poets": {"A_Poet": ["The poet ", " ", "A poem "]}, "cooks": {}})
    )
    assert read_prompts(path) == [
        EvalPrompt("The poet", categories=("poets",)),
        EvalPrompt("A poem", categories=("poets",)),
    ]
    path = written(tmp_path / "rows.json", json.dumps([{"context": "Six", "response": "no", "category": "c"}]))
    assert read_prompts(path) == [EvalPrompt("Six", categories=("c",))]
    with pytest.raises(DataError, match="row 1: no prompt text"):
        read_prompts(written(tmp_path / "other.json", '{"a": {"b": 1}, "c": 2}'))


def test_a_hub_set_is_fetched_by_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        if name == "org/absent":
            raise FileNotFoundError("not there")
        return datasets.Dataset.from_list([{"prompt": {"text": "One", "toxicity": 0.9}, "challenging": False}])

    monkeypatch.setattr(datasets, "load_dataset", load)  # no hub can be reached from a test
    assert read_prompts("org/set:test[:5]") == [EvalPrompt("One", 0.9)]
    assert asked == [("org/set", "test[:5]")]
    with pytest.raises(DataError, match="org/absent:train: cannot be fetched: not there"):
        read_prompts("org/absent")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "fine"}\nno json', "line 2: not JSON"),
        (b"[1]", "line 1: no prompt text"),
        (b'{"other": "a field"}', "line 1: no prompt text"),
        (b'{"prompt": "x", "challenging": "perhaps"}', "neither true nor false"),
        (b'{"prompt": "  "}', "line 1: no prompt text"),
        (b'{"prompt": {"toxicity": 0.5}}', "line 1: no prompt text"),
        (b'{"prompt": "\\ud800"}', "line 1: no prompt text .not valid UTF-8"),
        (b'{"prompt": {"text": "x", "toxicity": 2}}', "is no number in"),
        (b'{"prompt": {"text": "x", "toxicity": NaN}}', "is no number in"),
        (b"\n\n", "no prompt in it"),
        (b"\xff\xfe\x00", "binary"),
        (b"\xff\xfe", "line 1: not JSON"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_prompts(path)


def test_missing_files(tmp_path: Path) -> None:
    for read in (read_prompts, read_passages):
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / "absent.jsonl")


def test_passages(tmp_path: Path) -> None:
    squad = tmp_path / "squad.json"
    squad.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "One."}, {"context": "Two."}, {"context": "One."}]}]})
    )
    assert read_passages(squad) == ["One.", "Two."]
    text = tmp_path / "passages.txt"
    text.write_text("First line\nof a paragraph.\n\nSecond.\n")
    assert read_passages(text) == ["First line of a paragraph.", "Second."]
    text.write_text("One a line.\nAnother.\n")
    assert read_passages(text) == ["One a line.", "Another."]
    for content, said in (("{}", "SQuAD"), ("nothing", "not JSON"), ('{"data": []}', "no passage")):
        squad.write_text(content)
        with pytest.raises(DataError, match=said):
            read_passages(squad)


def test_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_scorer("embedded").name == "embedded"
    judge = LengthJudge()
    assert load_scorer(judge) is judge
    monkeypatch.setitem(__import__("sys").modules, "profanity_check", None)
    with pytest.raises(ScorerError, match="not installed"):
        load_scorer("profanity-check")


def test_profanity_check() -> None:
    pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed")
    judge = load_scorer("profanity-check")
    mild, rude = judge.score(["What a lovely garden.", "You stupid idiot."])
    assert 0 <= mild < 0.5 < rude <= 1
    assert judge.score([]) == []


# --- rows that survive


def test_journal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path, ("a", "b")) as journal:
        for n in (3, 1, 2):
            journal.add({"a": "x", "b": n, "text": "é\u2028"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": "x", "b": 4, "te')  # cut off by a kill
    with Journal(path, ("a", "b")) as journal:
        assert [("x", n) in journal for n in (1, 2, 3, 4)] == [True, True, True, False]
        journal.add({"a": "x", "b": 4, "text": "again"})
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["b"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [3, 1, 2, 4]
    path.write_bytes(whole * 2)
    assert len(Journal(path, ("a", "b")).rows) == 3  # no row counts twice
    path.write_text('{"a": "x"}\n')
    with pytest.raises(DataError, match="without a, b"):
        Journal(path, ("a", "b"))
    path.write_text("{\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        Journal(path, ("a", "b"))
    path.with_name("rows.jsonl.part").write_bytes(whole)
    with pytest.raises(DataError, match="older version"):
        Journal(path, ("a", "b"))


# --- methods


def test_method_names_and_strengths(tiny_llama: Backbone) -> None:
    stream = SteeringStream(random_detoxifier(tiny_llama, virtual_tokens=4))
    ingredients = Ingredients(tiny_llama, DecodingParams(alpha=0.0), DecodingParams(), (stream,))
    made = make_methods(list(METHODS), [1.0, 2.5, 1.0], ingredients)
    assert [method.name for method in made][:5] == ["plain", "default", "guard", "bounded α=1", "bounded α=2.5"]
    by_name = {method.name: method for method in made}
    assert len(by_name) == len(made) == 2 * 3 + 4
    assert by_name["detoxigen α=1"].params.rule == "detoxigen"
    assert (by_name["guard"].params.guard is None) == (by_name["default"].params.guard is not None)
    assert len({json.dumps(method.identity()) for method in made}) == len(made)
    with pytest.raises(InvalidParamsError, match="methods"):
        make_methods(["other"], [1.0], ingredients)
    with pytest.raises(InvalidParamsError, match="alpha"):
        make_methods(["dexperts"], [0.0], ingredients)


def test_a_polite_lead_stands_before_the_prompt() -> None:
    method = Method("resample", DecodingParams(alpha=0.0), lead="Be kind.")
    assert method.prompt("Hello") == "Be kind.\n\nHello"
    chat = [{"role": "user", "content": "Hello"}]
    assert method.prompt(chat) == [{"role": "system", "content": "Be kind."}, *chat]


def test_resampling_keeps_the_first_clean_reply_or_the_best(tiny_llama: Backbone) -> None:
    class Judge(LengthJudge):
        def __init__(self, scores: list[float]) -> None:
            self.left = iter(scores)

        def score(self, texts: Sequence[str]) -> list[float]:
            return [next(self.left) for _ in texts]

    params = DecodingParams(alpha=0.0, max_new_tokens=4, ignore_eos=True)
    with DetoxiGen(tiny_llama) as guard:
        replies = [
            guard.generate("One", params.replace(seed=(5 + n * 2**40) % 2**63)).text for n in range(8)
        ]  # what each try must say
        for scores, tries, kept in (
            ([0.1], 1, 0),
            ([0.9, 0.6, 0.4], 3, 2),
            ([0.9, 0.8, 0.6, 0.7, 0.9, 0.9, 0.9, 0.9], 8, 2),
        ):
            drawn = Method("resample", params, reject=Judge(scores)).draw(guard, "One", 5)
            assert (drawn.tries, drawn.generation.text, drawn.decoded_tokens) == (tries, replies[kept], 4 * tries)


# --- end to end


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
    more = measure(output=tmp_path, methods=("resample", "guard"), judges=(LengthJudge(),))
    assert list(more.summary["methods"]) == ["plain", "dexperts α=1", "resample", "guard"]
    assert [row for row in samples_of(tmp_path) if row["method"] in first.summary["methods"]] == before
    old, new = (report.summary["groups"][0]["methods"]["dexperts α=1"] for report in (first, more))
    assert old == new
    with pytest.raises(DataError, match="another seed"):
        measure(output=tmp_path, seed=8)
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
    more = measure(output=tmp_path, methods=("resample",), judges=(again := Trained("b", 0.75),), batch_rows=8)
    for figures in more.summary["groups"][0]["methods"].values():
        assert figures["length:expected_max"]["value"]["value"] == 0.75
    assert more.summary["batch_rows"] == 8
    seen = again.seen
    assert seen == 1 + sum(len(samples_of(tmp_path)) // 2 for _ in range(2))
    # Nothing is judged twice by one judge, nor is what was said of the decoding changed by judging.
    last = measure(output=tmp_path, methods=("resample",), judges=(again, "embedded"), batch_rows=64)
    assert again.seen == seen + 1
    assert last.summary["batch_rows"] == 8
    with pytest.raises(InvalidParamsError, match="length"):
        measure(output=tmp_path, judges=(Trained("a", 0.0), Trained("b", 0.0)))


def test_more_is_not_asked_for_at_once_than_the_queue_takes(tiny_llama: Backbone, tmp_path: Path) -> None:
    method = Method("plain", DecodingParams(alpha=0.0, max_new_tokens=2))
    jobs = [Job(method, i, "One", 0, i) for i in range(40)]
    config = EngineConfig(max_rows=32, max_queue=4)
    with Journal(tmp_path / "samples.jsonl", KEY) as journal, DetoxiGen(tiny_llama, config=config) as guard:
        decode(guard, jobs, journal, lambda: None)
        assert len(journal.rows) == 40


def _other(folder: Path) -> Any:
    return random_detoxifier(load_backbone(folder, device="cpu"), virtual_tokens=4, seed=99)


def test_one_process_a_folder(measure: Any, tmp_path: Path) -> None:
    with open_run(tmp_path), pytest.raises(DataError, match="another process"):
        measure(output=tmp_path)


def test_a_chat_run_goes_through_the_template(measure: Any, tmp_path: Path) -> None:
    bare = measure(output=tmp_path / "bare", methods=("resample",))
    chat = measure(output=tmp_path / "chat", methods=("resample",), chat=True)
    passages = written(tmp_path / "passages.txt", "\n\n".join(SENTENCES[:3]))
    behind = measure(output=tmp_path / "behind", methods=("resample",), passages=passages, passage_tokens=50)
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
        "methods": ("dexperts", "resample"), "samples": 25, "limit": 4, "max_new_tokens": 6,
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
            while process.is_alive() and (part.read_bytes().count(b"\n") if part.exists() else 0) < wanted:
                time.sleep(0.002)
            kills += process.is_alive()
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        assert not (cut / "summary.json").exists()
        seen.append(part.read_bytes().count(b"\n"))
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


# --- the report


def test_report_of_two_runs(measure: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one", tmp_path / "two"
    measure(output=one, methods=("dexperts", "resample", "guard"))
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
    class Failing(LengthJudge):
        def score(self, texts: Sequence[str]) -> list[float]:
            if next(self.calls) == 20:
                raise RuntimeError("out of order")
            return [0.0]

        calls = itertools.count()

    params = DecodingParams(alpha=0.0, max_new_tokens=3)
    method = Method("resample", params, reject=Failing())
    jobs = [Job(method, i, "One", 0, i) for i in range(4000)]
    ticks = itertools.count()
    with Journal(tmp_path / "samples.jsonl", KEY) as journal:
        with DetoxiGen(tiny_llama) as guard, pytest.raises(ScorerError, match="out of order"):
            decode(guard, jobs, journal, lambda: next(ticks))
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
