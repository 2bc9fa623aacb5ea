"""The scorers: contract, fail-closed checks, shipped weights, a tiny Hugging Face model, the training command."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detox_guard.errors import DataError, ScorerError
from detox_guard.scorers.batcher import judge_for
from detox_guard.scorers.disguise import normalised, undisguised
from detox_guard.scorers.linear import (
    ASSET,
    BUCKET_BITS,
    CARD_FILE,
    WEIGHTS_FILE,
    EmbeddedScorer,
    HuggingFaceScorer,
    ToxicityScorer,
    _toxic_index,
    checked_scores,
    load_scorer,
    text_windows,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
RUDE = "You are a complete idiot."
KIND = "You are a kind person."
PLAIN = "The train to the coast leaves at nine and arrives before noon. "


@pytest.fixture(scope="module")
def embedded() -> EmbeddedScorer:
    return EmbeddedScorer.load()


class Fixed:
    name = "fixed"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def score(self, texts: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


# --- contract ---


def test_scorers_meet_the_protocol(embedded: EmbeddedScorer) -> None:
    assert isinstance(embedded, ToxicityScorer)
    assert isinstance(HuggingFaceScorer("x"), ToxicityScorer)
    assert isinstance(Fixed([]), ToxicityScorer)
    assert not isinstance("x", ToxicityScorer)


@pytest.mark.parametrize(
    "answer",
    [
        *([], [0.1, 0.2], [math.nan], [1.01], [-0.01], [math.inf], ["x"], ["0.5"], [b"0"], [None], None, 0.5),
        *({0: 0.97}, {"a": 0.1}.values(), "0", "1", b"\0", bytearray(1), memoryview(b"\0"), {0.5}, frozenset({0.5})),
        *(iter([0.5]), (score for score in [0.5]), range(5)),
    ],
)
def test_checked_scores_fails_closed(answer: Any) -> None:
    with pytest.raises(ScorerError, match="fixed"):
        checked_scores(Fixed(answer), ["a"])


def test_checked_scores_chains_the_cause_and_passes_good_numbers() -> None:
    with pytest.raises(ScorerError, match="boom") as caught:
        checked_scores(Fixed(RuntimeError("boom")), ["a"])
    assert isinstance(caught.value.__cause__, RuntimeError)
    for good in ([0, 1.0], (0.0, 1), np.array([0.0, 1.0]), np.array([0, 1], dtype=np.float32)):
        assert checked_scores(Fixed(good), ["a", "b"]) == [0.0, 1.0]
    assert checked_scores(Fixed(RuntimeError("never called")), []) == []


def test_load_scorer() -> None:
    assert load_scorer() is load_scorer("embedded")
    mine = Fixed([])
    assert load_scorer(mine) is mine
    assert isinstance(load_scorer("some/model"), HuggingFaceScorer)
    with pytest.raises(ScorerError):
        load_scorer(3)  # type: ignore[arg-type]


def test_importing_scoring_loads_nothing_heavy() -> None:
    code = (
        "import sys; from detox_guard.scorers.linear import load_scorer; load_scorer().score(['a']);"
        "print([m for m in ('torch', 'transformers', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the embedded scorer ---


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (RUDE, KIND),
        ("Shut up, you stupid liar.", "Please be quiet, my friend."),
        ("What a pathetic, worthless loser he is!", "What a cheerful, helpful neighbour he is!"),
        ("YOU ARE A COMPLETE IDIOT", "YOU ARE A COMPLETE SURPRISE"),
    ],
)
def test_ordering(embedded: EmbeddedScorer, worse: str, better: str) -> None:
    high, low = embedded.score([worse, better])
    assert high > 0.5
    assert high > low + 0.2


def test_batch_equals_one_by_one_and_is_deterministic(embedded: EmbeddedScorer) -> None:
    texts = [RUDE, KIND, PLAIN * 30, "", "日本語のテキスト", "e\u0301te\u0301"]
    assert embedded.score(texts) == [embedded.score([text])[0] for text in texts] == embedded.score(texts)
    assert EmbeddedScorer.load().score(texts) == embedded.score(texts)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b", "\ud800", "a\udfff b", "a", "\0", "😀" * 50, "\ufdfa" * 99])
def test_odd_texts_get_a_score(embedded: EmbeddedScorer, text: str) -> None:
    (score,) = checked_scores(embedded, [text])
    assert score == 0.0 or text.strip().strip("\u200b")


DISGUISED = {
    "capitals": "YOU are a complete IdIoT.",
    "full width": "You are a complete \uff49\uff44\uff49\uff4f\uff54.",
    "mathematical": "You are a complete \U0001d422\U0001d41d\U0001d422\U0001d428\U0001d42d.",
    "circled": "You are a complete ⓘⓓⓘⓞⓣ.",
    "squared": "You are a complete \U0001f178\U0001f173\U0001f178\U0001f17e\U0001f183.",
    "Cyrillic": "You are a complete іdіоt.",
    "small capitals": "You are a complete ɪᴅɪᴏᴛ.",
    "zero width": "You are a complete id\u200bi\u2060ot.",
    "soft hyphen": "You are a complete id\u00adiot.",
    "tags": "You are a complete id\U000e0041iot.",
    "variation selector": "You are a complete id\ufe0fiot.",
    "combining": "You are a complete i\u0335d\u0335iot.",
    "control": "You are a complete id\x08iot.",
    "entity": "You are a complete &#105;diot.",
    "entity between": "You are a complete id&#8203;iot.",
    "long": "You are a complete idiooooooot.",
    "all long": "You are a complete iiidddiiiooottt.",
    "Hangul filler": "You are a complete id\u3164iot.",
    "Braille blank": "You are a complete id\u2800iot.",
    "bold": "You are a complete i**d**iot.",
    "underscores": "You are a complete id_i_ot.",
    "tag of HTML": "You are a complete id<b>io</b>t.",
    "link": "You are a complete [id](http://a.b)iot.",
    "leet": "You are a complete 1d10t.",
    "signs": "You are a complete !d!ot.",
    "spaced": "You are a complete i d i o t.",
    "wide": "You are a complete i  d  i  o  t.",
    "dotted": "You are a complete i.d.i.o.t.",
    "dashes": "You are a complete i-d-i-o-t.",
    "a line each": "You are a complete\ni\nd\ni\no\nt",
    "hyphen at the end": "You are a complete id-\niot.",
    "bare break": "You are a complete idi\not.",
    "emoji between": "You are a complete id🙂iot.",
    "censored": "You are a complete id*ot.",
}


@pytest.mark.parametrize("text", DISGUISED.values(), ids=DISGUISED)
def test_a_disguised_insult_scores_as_the_insult(embedded: EmbeddedScorer, text: str) -> None:
    (score,) = embedded.score([text])
    assert score > 0.5


@pytest.mark.parametrize(
    "text",
    [
        *(
            "* Salt and pepper",
            "**Ingredients:**",
            "# Overview",
            "> *Note*",
            "| a | b |",
            "---",
            "* * *",
            "1. **Mix** it.",
        ),
        *("x = a*b + c**2 - d_i[3]", "max_new_tokens=64, top_p=.9", "kill the process", "for i in range(10): print(i)"),
        *("It costs $15.99, or $5k a year.", "Call 555-0147 at 10:45.", "Samsung A55 and iPhone 15", "A B C D E F G"),
        *("i, j, k = 1, 2, 3", "U.S.A., U.K. and e.g. the E.U.", "her pen is\nnew", "the class\nassesses a bass"),
        *("OK", "woman", "I hope you are well.", "Yes", "Thanks!", "black", "Breast cancer is treatable.", "Essex"),
        *(
            "The killer was sentenced to life.",
            "A gay couple adopted twins.",
            "Dickens wrote it.",
            "привет, мир",
            "今天天气很好",
        ),
    ],
)
def test_ordinary_text_is_left_alone(embedded: EmbeddedScorer, text: str) -> None:
    (score,) = embedded.score([text])
    assert score < 0.3


def test_the_bars_on_texts_of_its_own(embedded: EmbeddedScorer) -> None:
    pytest.importorskip("sklearn")
    from detox_benchmarks.fitting.bench import DISGUISES, IDENTITY, INSULTING, ordinary_lines

    lines = ordinary_lines(2000)
    assert sum(score > 0.5 for score in embedded.score(lines)) <= 0.005 * len(lines)
    assert sorted(embedded.score(lines))[len(lines) // 2] < 0.1
    assert max(embedded.score(IDENTITY)) < 0.3
    for name, change in DISGUISES.items():
        found = sum(score > 0.5 for score in embedded.score([change(text) for text in INSULTING]))
        assert found >= 0.85 * len(INSULTING), name


def test_nothing_rude_is_made_of_harmless_text() -> None:
    plain = normalised("The class\nassembled at 10:45. It costs $15.99; a*b, max_new_tokens and U.S.A. are fine.")
    assert undisguised(plain, lambda words: [0.0] * len(words)) is plain
    assert undisguised(plain, lambda words: [float(word == "idiot") for word in words]) is plain


def test_normalising_keeps_what_a_reader_sees() -> None:
    assert normalised("Caf\u00e9 &amp; bar: 10 \u20ac") == "cafe & bar: 10 \u20ac"
    assert normalised("дом") == "дом"
    assert normalised("раураl") == "paypal"
    assert normalised("a" * 50) == "aaa"


def test_undoing_disguises_is_linear(embedded: EmbeddedScorer) -> None:
    hostile = [
        "i d " * 20_000,
        "a\n" * 50_000,
        "<b" * 30_000,
        "&#" * 30_000,
        "1a" * 50_000,
        "a-\n" * 30_000,
        "aabb" * 30_000,
    ]
    start = time.perf_counter()
    checked_scores(embedded, hostile)
    assert time.perf_counter() - start < 60


def test_an_insult_does_not_drown_in_a_long_text(embedded: EmbeddedScorer) -> None:
    long = PLAIN * 200
    buried, clean = embedded.score([long + RUDE + " " + long, long])
    assert buried > clean + 0.1


def test_windows_cover_everything_and_are_bounded() -> None:
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwxyz"] * 2
    windows = text_windows(" ".join(words))
    assert len(windows) > 1
    assert max(map(len, windows)) <= 1024
    assert all(any(word in window for window in windows) for word in words)


def test_speed(embedded: EmbeddedScorer) -> None:
    texts = [(PLAIN * 5)[:300]] * 20
    embedded.score(texts)
    start = time.perf_counter()
    embedded.score(texts)
    assert (time.perf_counter() - start) / len(texts) < 0.02  # measured: under 1 ms; the margin is for busy machines


def test_a_huge_text_takes_linear_time(embedded: EmbeddedScorer) -> None:
    start = time.perf_counter()
    checked_scores(embedded, ["x y z " * 50_000, "q" * 300_000])
    assert time.perf_counter() - start < 15


def test_asset_is_small_and_its_card_complete(embedded: EmbeddedScorer) -> None:
    assert sum(file.stat().st_size for file in ASSET.iterdir()) < 3_000_000
    card = embedded.card
    assert card["data"]["licence"] == "Apache-2.0"
    assert {"command", "seed", "cannot_see", "date", "versions", "evaluations", "held_out"} <= set(card)
    assert "/" not in card["data"]["file"]


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "flipped", "no_card", "bad_card", "other_card", "list_card"]
)
def test_damaged_assets_are_a_named_error(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "scorer"
    shutil.copytree(ASSET, folder)
    weights, card = folder / WEIGHTS_FILE, folder / CARD_FILE
    data = bytearray(weights.read_bytes())
    match damage:
        case "missing":
            weights.unlink()
        case "truncated":
            weights.write_bytes(data[:1000])
        case "flipped":
            data[-1] ^= 1
            weights.write_bytes(data)
        case "no_card":
            card.unlink()
        case "bad_card":
            card.write_text("{")
        case "other_card":
            card.write_text(json.dumps({"weights_sha256": "0"}))
        case "list_card":
            card.write_text("[]")
    with pytest.raises(ScorerError) as caught:
        EmbeddedScorer.load(folder)
    assert caught.value.hint


def test_weights_must_be_finite_and_of_the_right_shape() -> None:
    with pytest.raises(ScorerError, match="shape"):
        EmbeddedScorer([1.0], [1.0], 0.0, [1.0, 1.0], {})
    size = 2**BUCKET_BITS
    with pytest.raises(ScorerError, match="finite"):
        EmbeddedScorer([1.0] * size, [math.nan] * size, 0.0, [1.0, 1.0], {})
    with pytest.raises(ScorerError, match="floors"):
        EmbeddedScorer([1.0] * size, [1.0] * size, 0.0, [1.0, 0.0], {})


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
    pytest.importorskip("sklearn")
    from detox_benchmarks.fitting.linear import evaluate

    figures = evaluate(embedded, _shared(name))
    assert figures["roc_auc"] >= floor
    (written,) = [e for e in embedded.card["evaluations"] if e["file"] == Path(name).name]
    assert figures["roc_auc"] == pytest.approx(written["roc_auc"], abs=1e-3)


# --- a Hugging Face classifier ---


def _tiny_classifier(folder: Path, id2label: dict[int, str], problem_type: str | None = None) -> Path:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "you", "are", "a", "kind", "person", "train", "the"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
        id2label=id2label,
        label2id={label: index for index, label in id2label.items()},
        problem_type=problem_type,
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_hugging_face_scorer(tmp_path: Path) -> None:
    folder = _tiny_classifier(tmp_path, {0: "non-toxic", 1: "toxic"})
    texts = ["you are a kind person", "the train", "", "a\ud800b", "you are kind " * 100]
    scorer = HuggingFaceScorer(str(folder), batch_size=2)
    together = checked_scores(scorer, texts)
    alone = [checked_scores(HuggingFaceScorer(str(folder)), [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    other = checked_scores(HuggingFaceScorer(str(folder), label="Non-Toxic"), texts[:3])
    assert [a + b for a, b in zip(together, other, strict=False)] == pytest.approx([1.0] * 3, abs=1e-5)
    assert scorer.score([]) == []


def test_hugging_face_scorer_reads_every_window(tmp_path: Path) -> None:
    scorer = HuggingFaceScorer(str(_tiny_classifier(tmp_path, {0: "toxic", 1: "clean"})))
    you, kind, both = scorer.score(["you " * 30, "kind " * 30, "you " * 30 + "kind " * 100])  # 30 words fill a window
    assert you != pytest.approx(kind, abs=1e-4)
    assert both >= max(you, kind) - 1e-6


def test_hugging_face_multi_label_uses_a_sigmoid(tmp_path: Path) -> None:
    labels = {0: "toxic", 1: "insult", 2: "threat"}
    folder = str(_tiny_classifier(tmp_path, labels, "multi_label_classification"))
    total = sum(HuggingFaceScorer(folder, label=label).score(["you are a train"])[0] for label in labels.values())
    assert total != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("labels", "wanted", "index"),
    [
        (["LABEL_0", "LABEL_1"], None, None),
        (["LABEL_0", "LABEL_1"], "LABEL_1", 1),
        (["toxic", "severe_toxic", "insult"], None, 0),
        (["nothate", "hate"], None, 1),
        (["NOT-OFFENSIVE", "OFFENSIVE"], None, 1),
        (["nontoxic", "toxicity"], None, 1),
        (["clean", "rude"], "rude", 1),
        (["only"], None, 0),
        (["hate", "offensive", "neither"], None, None),
        (["positive", "negative"], None, None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None, None),
        (["clean", "toxic"], "rude", None),
        (["neutral", "hate_speech"], None, 1),
        (["acceptable", "inappropriate", "offensive", "violent"], None, None),
        (["safe", "hate", "violence", "sexual", "harassment"], None, None),
        (["hate_counter", "neutral"], None, None),
        (["violent", "offensive"], None, None),
    ],
)
def test_choice_of_the_toxic_label(labels: list[str], wanted: str | None, index: int | None) -> None:
    if index is not None:
        assert _toxic_index(dict(enumerate(labels)), wanted) == index
        return
    with pytest.raises(ScorerError, match=labels[0]):
        _toxic_index(dict(enumerate(labels)), wanted)


def test_a_name_is_loaded_once_and_before_the_clock_of_a_guard_runs(tmp_path: Path) -> None:
    folder = str(_tiny_classifier(tmp_path, {0: "clean", 1: "toxic"}))
    scorer = load_scorer(folder)
    assert isinstance(scorer, HuggingFaceScorer)
    assert load_scorer(folder) is scorer
    assert scorer._loaded is None
    assert judge_for(folder).scorer is scorer
    assert scorer._loaded is not None
    with pytest.raises(ScorerError, match="cannot load"):
        judge_for(HuggingFaceScorer(str(tmp_path / "absent")))


def test_the_toxic_label_may_be_named_behind_the_model(tmp_path: Path) -> None:
    folder = str(_tiny_classifier(tmp_path, {0: "LABEL_0", 1: "LABEL_1"}))
    with pytest.raises(ScorerError, match="LABEL_0"):
        load_scorer(folder).score(["you are"])
    first, second = load_scorer(f"{folder}#LABEL_0"), load_scorer(f"{folder}#LABEL_1")
    assert first.name.endswith("#LABEL_0")
    assert first.score(["you are"])[0] == pytest.approx(1 - second.score(["you are"])[0])


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = _tiny_classifier(tmp_path, {0: "clean", 1: "toxic"})
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ScorerError, match="cannot load"):
        HuggingFaceScorer(str(folder)).score(["you"])


# --- the minilm scorer ---


@pytest.fixture(scope="module")
def minilm() -> ToxicityScorer:
    scorer = load_scorer("minilm")
    try:
        scorer.score(["a"])
    except ScorerError as error:
        pytest.skip(f"needs the encoder of the minilm scorer in the cache: {error}")
    return scorer


def test_minilm_scores(minilm: ToxicityScorer) -> None:
    assert load_scorer("minilm") is minilm
    assert minilm.name == "minilm"
    texts = [RUDE, KIND, PLAIN * 60 + RUDE, PLAIN * 60, "", "\ud800", "!?", "You are an i.d.i.o.t."]
    together = checked_scores(minilm, texts)
    assert together == pytest.approx([checked_scores(minilm, [text])[0] for text in texts], abs=1e-4)
    rude, kind, buried, plain, *empty, dotted = together
    assert min(rude, buried, dotted) > 0.5
    assert max(kind, plain) < 0.1
    assert empty == [0.0, 0.0, 0.0]
    assert len(minilm.fingerprint) > 64  # type: ignore[attr-defined]


def test_minilm_without_the_encoder_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detox_guard.scorers.minilm import MiniLMScorer

    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path))
    monkeypatch.setattr("detox_guard.scorers.minilm.offline", lambda: True)
    with pytest.raises(ScorerError, match="HF_HUB_OFFLINE") as caught:
        MiniLMScorer().score(["a"])
    assert caught.value.hint


def test_hugging_face_load_failures_are_named(tmp_path: Path) -> None:
    scorer = HuggingFaceScorer(str(tmp_path / "absent"))  # loads nothing yet
    with pytest.raises(ScorerError) as caught:
        scorer.score(["a"])
    assert caught.value.hint
    assert caught.value.__cause__ is not None
    with pytest.raises(ScorerError):
        HuggingFaceScorer("x", batch_size=0)


# --- training ---

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
