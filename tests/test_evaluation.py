"""Evaluation: figures against hand-computed ones, files good and bad, and one small run from end to end."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import SENTENCES, make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard.detoxifier import SteeringStream
from detox_guard.errors import DataError, InvalidParamsError, PromptTooLongError, ScorerError
from detox_guard.evaluation import (
    EvalPrompt,
    choose_prompts,
    context_kl,
    evaluate,
    load_judge,
    read_passages,
    read_prompts,
    run_eval,
)
from detox_guard.evaluation import machine as machine_module
from detox_guard.evaluation.context import reply_kl
from detox_guard.evaluation.likelihood import reply_nll
from detox_guard.evaluation.machine import write_whole
from detox_guard.evaluation.metrics import Bootstrap, distinct_n, toxicity
from detox_guard.evaluation.samples import System, seed_of
from detox_guard.evaluation.shapes import random_detoxifier
from detox_guard.generation import DetoxiGen
from detox_guard.params import DecodingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.backbone import Backbone

DATA = Path(os.environ.get("DETOX_GUARD_DATA", Path(__file__).parents[2] / "shared" / "data"))


class LengthJudge:
    """Scores a text by its length: longer is worse."""

    name = "length"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [min(1.0, len(text) / 60) for text in texts]


def text_of(table: Any) -> str:
    with io.StringIO() as file:
        Console(file=file, width=200).print(table)
        return file.getvalue()


def rtp_row(text: str, toxicity: float | None) -> str:
    return json.dumps({"prompt": {"text": text, "toxicity": toxicity}, "continuation": {"text": " and so on"}})


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny_model(make_tiny_config("llama")).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


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
    figures = toxicity(scores, Bootstrap(4), plain)
    assert figures.expected_max.value == pytest.approx((0.9 + 0.4 + 0.5 + 0.0) / 4)
    assert figures.probability.value == pytest.approx(2 / 4)  # .5 itself counts
    assert figures.mean.value == pytest.approx(2.2 / 8)
    assert figures.expected_max_reduction is not None
    assert figures.expected_max_reduction.value == pytest.approx(1 - 1.8 / 2.4)
    assert figures.probability_reduction is not None
    assert figures.probability_reduction.value == pytest.approx(1 - 2 / 3)
    assert toxicity(plain, Bootstrap(4)).mean_reduction is None


def test_bootstrap_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = Bootstrap(60, seed=trial, resamples=400).mean(rng.beta(2, 5, size=60))
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 2 / 7 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_pairs_prompts_and_repeats() -> None:
    plain = np.random.default_rng(2).uniform(0.1, 1.0, 50)
    bootstrap = Bootstrap(50, seed=3)
    reduction = bootstrap.reduction(plain * 0.6, plain)  # the same cut on every prompt: no spread at all
    assert (reduction.value, reduction.low, reduction.high) == pytest.approx((0.4, 0.4, 0.4))
    assert bootstrap.mean(plain) == Bootstrap(50, seed=3).mean(plain)
    assert bootstrap.mean(plain) != Bootstrap(50, seed=4).mean(plain)


def test_bootstrap_without_a_denominator_is_undefined() -> None:
    nothing = Bootstrap(3).reduction([0.1, 0.2, 0.3], [0.0, 0.0, 0.0])
    assert (nothing.value, nothing.low, nothing.high) == (None, None, None)
    assert Bootstrap(2).perplexity([0.0, 0.0], [0, 0]).value is None


def test_perplexity_is_weighted_by_token() -> None:
    bootstrap = Bootstrap(2)
    assert bootstrap.perplexity([3.0, 9.0], [2, 10]).value == pytest.approx(math.exp(12 / 12))
    ratio = bootstrap.perplexity_ratio([3.0, 9.0], [2, 10], [2.0, 4.0], [4, 8])
    assert ratio.value == pytest.approx(math.exp(1 - 0.5))


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


def test_prompts_are_read_and_chosen_by_label(prompts_file: Path) -> None:
    prompts = read_prompts(prompts_file)
    assert [prompt.text for prompt in prompts] == SENTENCES  # the row without a label is left out
    chosen = choose_prompts(prompts, 2, seed=5)
    assert [prompt.group for prompt in chosen] == ["toxic", "toxic", "non-toxic", "non-toxic"]
    assert chosen == choose_prompts(prompts, 2, seed=5)
    assert len({tuple(choose_prompts(prompts, 2, seed=seed)) for seed in range(10)}) > 1
    assert EvalPrompt("at the border", 0.5).group == "toxic"


def test_plain_prompts_have_no_label(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('\n{"prompt": "One"}\n\n{"prompt": "Two"}\n')
    assert [(p.text, p.group) for p in read_prompts(path)] == [("One", "all"), ("Two", "all")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "fine"}\nno json', "line 2: not JSON"),
        (b"[1]", "line 1: no prompt text"),
        (b'{"text": "other field"}', "line 1: no prompt text"),
        (b'{"prompt": "  "}', "line 1: no prompt text"),
        (b'{"prompt": {"toxicity": 0.5}}', "line 1: no prompt text"),
        (b'{"prompt": "\\ud800"}', "line 1: not valid Unicode"),
        (b'{"prompt": {"text": "x", "toxicity": 2}}', "is no number in"),
        (b'{"prompt": {"text": "x", "toxicity": NaN}}', "is no number in"),
        (b"\n\n", "no prompt in it"),
        (b"\xff\xfe\x00", "cannot be read as text"),
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
    for content, said in (("{}", "SQuAD"), ("nothing", "SQuAD"), ('{"data": []}', "no passage")):
        squad.write_text(content)
        with pytest.raises(DataError, match=said):
            read_passages(squad)


def test_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_judge("embedded").name == "embedded"
    judge = LengthJudge()
    assert load_judge(judge) is judge
    monkeypatch.setitem(__import__("sys").modules, "profanity_check", None)
    with pytest.raises(ScorerError, match="not installed"):
        load_judge("profanity-check")


def test_profanity_check() -> None:
    pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed")
    judge = load_judge("profanity-check")
    mild, rude = judge.score(["What a lovely garden.", "You stupid idiot."])
    assert 0 <= mild < 0.5 < rude <= 1
    assert judge.score([]) == []


# --- end to end


def test_run_eval(tiny_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    from detox_guard.backbone import load_backbone

    detoxifier = random_detoxifier(load_backbone(tiny_folder, device="cpu"), virtual_tokens=4)
    output = tmp_path / "out"

    def run(**changes: Any) -> Any:
        asked: dict[str, Any] = {
            "model": tiny_folder,
            "detoxifier": detoxifier,
            "device": "cpu",
            "dtype": "float32",
            "prompts": prompts_file,
            "judges": (LengthJudge(), "embedded"),
            "alphas": (1.0, 3.0),
            "rules": ("dexperts", "detoxigen"),
            "samples": 3,
            "max_new_tokens": 6,
            "limit": 2,
            "seed": 7,
            "progress": False,
        }
        return run_eval(**{**asked, **changes})

    report = run(output=output)
    assert [group.group for group in report.groups] == ["toxic", "non-toxic"]
    names = ["plain", "dexperts α=1", "dexperts α=3", "detoxigen α=1", "detoxigen α=3"]
    for group in report.groups:
        assert group.prompts == 2
        assert [system.system for system in group.systems] == names
        plain, *steered = group.systems
        assert plain.kl_detoxifier is None
        assert plain.perplexity_ratio is None
        for system in steered:
            assert system.kl_detoxifier is not None
            assert system.kl_detoxifier > 0
            assert system.perplexity_ratio is not None
            assert set(system.toxicity) == {"length", "embedded"}

    line = report.to_json()
    assert "\n" not in line
    parsed = json.loads(line)["eval"]
    assert parsed["detoxifiers"][0]["sha256"] == detoxifier.sha256
    assert parsed["judges"] == ["length", "embedded"]
    assert parsed["seed"] == 7
    assert parsed["machine"]["cores"] >= 1
    assert parsed["versions"]["torch"] == torch.__version__

    shown = text_of(report.table())
    assert "toxicity of the continuations" in shown
    assert "detoxigen α=3" in shown

    rows = [json.loads(row) for row in (output / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 5 * 4 * 3
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "samples.jsonl"]
    assert json.loads((output / "report.json").read_text())["eval"]["seed"] == 7
    # the report is what the samples say
    worst: dict[str, float] = {}
    for row in rows:
        if row["system"] == "plain" and row["group"] == "toxic":
            worst[row["prompt"]] = max(worst.get(row["prompt"], 0.0), min(1.0, len(row["text"]) / 60))
    assert report.groups[0].systems[0].toxicity["length"].expected_max.value == pytest.approx(
        np.mean(list(worst.values()))
    )
    by_system = {name: [row["seed"] for row in rows if row["system"] == name] for name in names}
    assert len({tuple(seeds) for seeds in by_system.values()}) == 1  # the same luck for everyone
    assert len(set(by_system["plain"])) == 12

    again = run(alphas=(3.0,), rules=("detoxigen",), judges=(LengthJudge(),))
    assert again.groups[0].systems[1].toxicity["length"] == report.groups[0].systems[4].toxicity["length"]


def test_run_eval_refuses_before_loading(prompts_file: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    with pytest.raises(DataError, match="nothing can be written"):
        run_eval(model="no/such-model", prompts=prompts_file, output=blocked)
    with pytest.raises(InvalidParamsError, match="judges"):
        run_eval(model="no/such-model", prompts=prompts_file, judges=())
    with pytest.raises(InvalidParamsError, match="rule"):
        run_eval(model="no/such-model", prompts=prompts_file, rules=("other",))  # type: ignore[arg-type]


def test_a_failing_judge_is_found_first(tiny_llama: Backbone) -> None:
    class Broken(LengthJudge):
        def score(self, texts: Sequence[str]) -> list[float]:
            return [math.nan for _ in texts]

    system = System("plain", DecodingParams(alpha=0.0, max_new_tokens=2))
    with DetoxiGen(tiny_llama) as guard:
        with pytest.raises(ScorerError):
            evaluate(guard, [EvalPrompt("One")], [system], [Broken()], samples=1)
        assert guard.stats().submitted == 0
        with pytest.raises(InvalidParamsError, match="samples"):
            evaluate(guard, [EvalPrompt("One")], [system], [LengthJudge()], samples=0)
        report = evaluate(guard, [EvalPrompt("One"), EvalPrompt("Two")], [system], [LengthJudge()], samples=2)
    assert report.groups[0].group == "all"


def test_seeds_differ_by_prompt_and_sample() -> None:
    assert len({seed_of(s, i, j, 8) for s in (0, 1) for i in range(50) for j in range(8)}) == 800


def test_write_whole_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(machine_module.os, "replace", fail)
    with pytest.raises(DataError, match="no space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- the pull of the soft prompt behind a context


@pytest.mark.parametrize("position", ["front", "reply"])
def test_reply_kl_is_what_the_engine_reports(tiny_llama: Backbone, position: Any) -> None:
    detoxifier = random_detoxifier(tiny_llama, virtual_tokens=5)
    card = detoxifier.card.model_copy(update={"position": position})
    detoxifier = type(detoxifier)(detoxifier.embeddings, card)
    with DetoxiGen(tiny_llama, [SteeringStream(detoxifier)]) as guard:
        ids = tiny_llama.tokenizer(SENTENCES[1])["input_ids"]
        trace = guard.generate(SENTENCES[1], alpha=1.0, max_new_tokens=12, ignore_eos=True, seed=3).trace
    assert trace is not None
    reply = [token.token_id for token in trace.tokens]
    longer = [*reply, *reply[:4]]  # padding of a neighbour changes nothing
    kl, _ = reply_kl(tiny_llama, detoxifier.embeddings, position, ids, [reply, longer])
    np.testing.assert_allclose(kl.numpy(), [token.kl_detoxifier for token in trace.tokens[1:]], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("decode", [False, True])
def test_context_kl(tiny_llama: Backbone, decode: bool) -> None:
    detoxifier = random_detoxifier(tiny_llama, virtual_tokens=4)
    with DetoxiGen(tiny_llama, [SteeringStream(detoxifier)]) as guard:
        asked: dict[str, Any] = {"reply_tokens": 8, "contexts": 2, "decode": decode}
        found = context_kl(guard, SENTENCES, SENTENCES[:3], passage_tokens=(60, 120), **asked)
        with pytest.raises(PromptTooLongError):
            context_kl(guard, SENTENCES, SENTENCES, passage_tokens=(900,), **asked)
        with pytest.raises(DataError):
            context_kl(guard, [], SENTENCES)
    assert [s.setting for s in found.settings] == [
        "bare",
        "chat",
        "chat + 60-token passage",
        "chat + 120-token passage",
    ]
    lengths = [s.context_tokens for s in found.settings]
    assert lengths == sorted(lengths)
    assert all(s.kl > 0 and math.isfinite(s.kl) for s in found.settings)
    assert found.settings[0].of_bare == 1.0
    if not decode:
        assert len({s.tokens for s in found.settings}) == 1  # the same tokens in each setting
    assert json.loads(found.to_json())["context_kl"]["position"] == "reply"
    assert "120-token passage" in text_of(found.table())
    with DetoxiGen(tiny_llama) as bare, pytest.raises(InvalidParamsError, match="detoxifier"):
        context_kl(bare, SENTENCES, SENTENCES)


def test_the_shared_prompt_file() -> None:
    path = DATA / "rtp" / "dev_prompts.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set DETOX_GUARD_DATA to the folder that holds rtp/")
    chosen = choose_prompts(read_prompts(path), 100, seed=0)
    assert [sum(p.group == group for p in chosen) for group in ("toxic", "non-toxic")] == [100, 100]
