"""A Hugging Face classifier as a scorer, on a tiny random one: windows, labels, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from detox_guard.errors import ScorerError
from detox_guard.scorers.base import checked_scores, load_scorer
from detox_guard.scorers.batcher import batcher_for
from detox_guard.scorers.classifier import HuggingFaceScorer, toxic_index

if TYPE_CHECKING:
    from pathlib import Path


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
        assert toxic_index(dict(enumerate(labels)), wanted) == index
        return
    with pytest.raises(ScorerError, match=labels[0]):
        toxic_index(dict(enumerate(labels)), wanted)


def test_a_name_is_loaded_once_and_before_the_clock_of_a_guard_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(_tiny_classifier(tmp_path, {0: "clean", 1: "toxic"}))
    scorer = load_scorer(folder)
    assert isinstance(scorer, HuggingFaceScorer)
    assert load_scorer(folder) is scorer
    asked: list[str] = []
    monkeypatch.setattr(HuggingFaceScorer, "prepare", lambda self: asked.append(self.name))
    batcher = batcher_for(folder)
    assert batcher.scorer is scorer
    assert batcher_for(scorer) is batcher
    assert asked == [scorer.name]
    monkeypatch.undo()
    with pytest.raises(ScorerError, match="cannot load"):
        batcher_for(HuggingFaceScorer(str(tmp_path / "absent")))


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


def test_hugging_face_load_failures_are_named(tmp_path: Path) -> None:
    scorer = HuggingFaceScorer(str(tmp_path / "absent"))  # loads nothing yet
    with pytest.raises(ScorerError) as caught:
        scorer.score(["a"])
    assert caught.value.hint
    assert caught.value.__cause__ is not None
    with pytest.raises(ScorerError):
        HuggingFaceScorer("x", batch_size=0)
