"""Training: rows, layouts, the loss, and whole runs on tiny models."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import peft
import pytest
import torch
from tiny import TEXTS, make_tiny_backbone
from torch.nn import functional

from detox_guard.detoxifiers.soft_prompt import Detoxifier, Position
from detox_guard.errors import (
    DataError,
    DetoxGuardError,
    DetoxifierFormatError,
    DetoxifierMismatchError,
    InvalidParamsError,
)
from detox_guard.steering.forced import both_logits, contrast, pair_loss, reply_logits, reply_loss
from detox_guard.training import TrainingConfig, train_detoxifier
from detox_guard.training.data import Reply, read_pairs, read_texts
from detox_guard.training.examples import KINDS, Batch, Examples, Kind, Steps, rows_of, texts_for
from detox_guard.training.rows import divide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.models.backbone import Backbone

HERE = Path(__file__).parent


# 1. Rows


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one, two", "n": 1}\n\n{"text": " three "}\n'),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one, two"}\r\n{"text": "three"}'),
        ("a.csv", 'id,text\n1,"one, two"\n2,three\n'),
        ("a.tsv", "text\tid\none, two\t1\nthree\t2\n"),
        ("a.csv", 'id,text\r\n1,"one, two"\r\n2,three\r\n'),
        ("a.txt", "one, two\n\n   \nthree"),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str | bytes) -> None:
    rows = read_texts(write(tmp_path / name, content), licence="CC0-1.0")
    assert rows.texts == ("one, two", "three")
    assert (rows.source.name, rows.source.rows, rows.source.licence) == (name, 2, "CC0-1.0")
    assert len(rows.source.sha256) == 64
    assert rows.bad == ()


BAD_JSONL = (
    b'{"text": "fine"}\n{oops\n{"txt": "x"}\n{"text": "  "}\n{"text": 5}\n[1]\n{"text": "\xff"}\n{"text": "\\ud800"}'
)


def test_bad_rows_are_skipped_by_line(tmp_path: Path) -> None:
    rows = read_texts(write(tmp_path / "a.jsonl", BAD_JSONL), max_bad_rows=7)
    assert rows.texts == ("fine",)
    assert [line for line, _ in rows.bad] == [2, 3, 4, 5, 6, 7, 8]
    reasons = " ".join(reason for _, reason in rows.bad)
    for part in ("not JSON", "no 'text'", "is empty", "is int", "not a JSON object", "not valid UTF-8"):
        assert part in reasons


def test_pairs_of_rows(tmp_path: Path) -> None:
    rows = read_pairs(str(pairs_file(tmp_path)))
    assert rows.pairs[0] == (f"zzz qqq {TEXTS[0]}", f"aaa eee {TEXTS[0]}")
    assert rows.bad == ((len(TEXTS) + 1, "no 'neutral'"),)
    prompted = write(tmp_path / "own.csv", "prompt,toxic,neutral\nThe bus,is awful,is late\n")
    assert read_pairs(prompted).pairs == ((Reply("The bus", " is awful"), Reply("The bus", " is late")),)
    asked = write(
        tmp_path / "asked.jsonl", '{"question": "How is the bus?", "text": "Late."}\n{"prompt": 3, "text": "Late."}'
    )
    assert read_texts(asked).texts == (Reply("How is the bus?", "Late.", chat=True), "Late.")
    assert read_texts(prompted, field="toxic").texts == (Reply("The bus", " is awful"),)
    with pytest.raises(DataError, match="plain text has no toxic and neutral"):
        read_pairs(write(tmp_path / "lines.txt", "one\ntwo\n"))
    with pytest.raises(DataError, match="1 bad rows, 0 allowed"):
        read_pairs(str(pairs_file(tmp_path)), max_bad_rows=0)


def test_too_many_bad_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", BAD_JSONL)
    with pytest.raises(DataError, match=r"7 bad rows, 6 allowed: line 2: not JSON .*line 3: no 'text'") as caught:
        read_texts(source, max_bad_rows=6)
    assert source in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no usable row"),
        ("a.txt", b"\n \n", "no usable row"),
        ("a.csv", b"", "no usable row"),
        ("a.csv", b"id,words\n1,x\n", "no column 'text'; it has 'id', 'words'"),
        ("a.csv", b'text\n"open', "not readable as CSV"),
        ("a.jsonl", b"\x00\x01\x02", "binary"),
        ("a.jsonl", b"only\nrubbish", "no usable row in it: line 1: not JSON"),
        ("a.parquet", b"PAR1", "not a .jsonl"),
        ("a", b"text", "not a .jsonl"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_texts(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_only_line_ends_end_a_row_of_a_table(tmp_path: Path) -> None:
    rows = read_texts(write(tmp_path / "a.csv", "text,id\nall of\x85this\u2028text\f!,1\n"))
    assert rows.texts == ("all of\x85this\u2028text\f!",)


def test_short_csv_row_is_bad(tmp_path: Path) -> None:
    rows = read_texts(write(tmp_path / "a.csv", "id,text\n1\n2,fine\n"))
    assert (rows.texts, rows.bad) == (("fine",), ((2, "no 'text'"),))


def test_absent_file(tmp_path: Path) -> None:
    for source in (str(tmp_path / "absent.jsonl"), "absent", "a/b/c"):
        with pytest.raises(DataError, match="no such file"):
            read_texts(source)
    with pytest.raises(DataError, match="not a"):
        read_texts(str(tmp_path))


def test_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> Any:
        if name != "org/name":
            raise ConnectionError("no network")
        return datasets.Dataset.from_dict({"text": [split, "", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_texts("org/name:test[:10%]")
    assert (rows.texts, rows.source.name) == (("test[:10%]", "two"), "org/name:test[:10%]")
    assert rows.bad == ((2, "'text' is empty"),)
    assert read_texts("org/name").texts[0] == "train"
    with pytest.raises(DataError, match="no column 'other'"):
        read_texts("org/name", field="other")
    with pytest.raises(DataError, match="other/name:train: cannot be fetched: no network"):
        read_texts("other/name")


# 2. Layouts


def test_split_is_cut_at_a_space(tiny_llama: Backbone) -> None:
    batch = Examples(tiny_llama).batch("split", [TEXTS[0], "word", TEXTS[1]], random.Random(0))
    decode = tiny_llama.tokenizer.decode
    for row, text in enumerate([TEXTS[0], "word", TEXTS[1]]):
        before, after = (
            decode(batch[ids][row][batch[mask][row].bool()])  # type: ignore[literal-required]
            for ids, mask in (("context_ids", "context_mask"), ("reply_ids", "reply_mask"))
        )
        assert before + after == text
        assert (before == "") == (text == "word")
        assert text == "word" or after.startswith(" ")
    assert batch["context_mask"][0, -1] == 1  # padded on the left, hence next to the virtual tokens


def test_a_prompt_is_the_context(tiny_llama: Backbone) -> None:
    own, whole = Reply("The bus", " is late"), "The bus is late"
    examples, tokenizer = Examples(tiny_llama), tiny_llama.tokenizer
    batch = examples.batch("split", [own], random.Random(0))
    assert tokenizer.decode(batch["context_ids"][0], skip_special_tokens=True) == own.prompt
    assert tokenizer.decode(batch["reply_ids"][0]) == own.text
    bare = examples.batch("bare", [own, whole], random.Random(0))
    assert tokenizer.batch_decode(bare["context_ids"], skip_special_tokens=True)[0].endswith(own.prompt)
    assert not bare["context_mask"][1].any()
    read = [ids[mask.bool()] for ids, mask in zip(bare["reply_ids"], bare["reply_mask"], strict=True)]
    assert tokenizer.batch_decode(read) == [own.text, whole]
    assert tokenizer.decode(examples.batch("passage", [own], random.Random(0))["reply_ids"][0]) == "is late"
    answer = Reply("The bus", "is late", chat=True)
    assert tokenizer.decode(examples.batch("passage", [answer], random.Random(0))["reply_ids"][0]) == "is late"
    batch = examples.batch("chat", [answer, whole], random.Random(0))
    turns = tokenizer.batch_decode(batch["context_ids"])
    assert "<|im_start|>user\nThe bus<|im_end|>" in turns[0]
    assert "The bus<|im_end|>" not in turns[1]
    assert all(turn.endswith("<|im_start|>assistant\n") for turn in turns)
    assert tokenizer.decode(batch["reply_ids"][0], skip_special_tokens=True) == "is late"


def test_each_kind_of_batch_takes_the_texts_that_fit() -> None:
    """A continuation behind its prompt, an answer behind its question; whatever there is where nothing fits."""
    plain, continued, answer = "Late.", Reply("The bus", " is late"), Reply("How is it?", "Late.", chat=True)
    wanted = {"bare": [plain], "split": [continued], "chat": [answer], "passage": [plain]}
    for kind in KINDS:
        assert texts_for(kind, [plain, continued, answer]) == wanted[kind]
        assert texts_for(kind, [continued]) == [continued]
        assert texts_for(kind, [plain]) == [plain]
    assert texts_for("chat", [plain, continued]) == [continued]


def test_with_pairs_no_text_is_passed_over(tiny_llama: Backbone, tmp_path: Path) -> None:
    """Pairs are half of a batch; the other half goes on where it stopped."""
    seen: list[str] = []

    class Seen(Examples):
        def batch(self, kind: Kind, texts: Sequence[Any], rng: random.Random) -> Batch:
            seen.extend(texts)
            return super().batch(kind, texts, rng)

    texts, anchors = ([f"{word} number {i}" for i in range(16)] for word in ("Bad", "Good"))
    pairs = [("Bad word", "Good word")]
    config = settings(tmp_path, steps=8, batch_size=4, mixture=(1, 0, 0, 0), anchor_weight=1.0)
    steps = Steps(Seen(tiny_llama), texts, anchors, pairs, config)
    for i in range(8):
        steps[i]
    assert [seen.count(text) for text in texts + anchors] == [1] * 32


def test_what_follows_one_prompt_is_held_out_together(tmp_path: Path) -> None:
    pairs = [(Reply(f"P{i}", f" bad {j}"), Reply(f"P{i}", " good")) for i in range(10) for j in range(4)]
    train_rows, heldout = divide(pairs, settings(tmp_path, heldout=6))
    assert len(heldout) == 8
    assert len(train_rows) == 32
    assert not {toxic.prompt for toxic, _ in train_rows} & {toxic.prompt for toxic, _ in heldout}


@pytest.mark.parametrize("kind", ["split", "chat"])
def test_rows_of_a_batch(tiny_llama: Backbone, kind: Kind) -> None:
    """Contexts go with their replies; one that is shared stays."""
    batch = batch_of(tiny_llama, kind)
    some = rows_of(batch, slice(1, None))
    assert torch.equal(some["reply_ids"], batch["reply_ids"][1:])
    assert torch.equal(some["context_ids"], batch["context_ids"][1:] if kind == "split" else batch["context_ids"])


def test_chat_contexts(tiny_llama: Backbone) -> None:
    examples = Examples(tiny_llama, contexts=["Birds nest in trees."], passage_len=(50, 60), reply_len=4)
    decode = tiny_llama.tokenizer.decode
    for kind in ("chat", "passage"):
        batch = examples.batch(kind, TEXTS[:3], random.Random(0))  # type: ignore[arg-type]
        context = decode(batch["context_ids"][0])
        assert len(batch["context_ids"]) == 1
        assert context.startswith("<|im_start|>user\n")
        assert context.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert batch["reply_ids"].shape == (3, 4)
    assert context.count("Birds nest in trees.") >= 2
    assert 50 <= batch["context_ids"].shape[1] <= 150
    assert examples.batch("bare", TEXTS[:3], random.Random(0))["context_ids"].shape == (1, 0)


def test_contexts_are_cut_to_the_backbone(tiny_gpt2: Backbone) -> None:
    batch = Examples(tiny_gpt2, max_context_len=30).batch("passage", TEXTS[:2], random.Random(0))
    assert batch["context_ids"].shape == (1, 30)
    assert tiny_gpt2.tokenizer.decode(batch["context_ids"][0]).endswith("assistant\n")


# 3. The forward pass


def soft_prompt(backbone: Backbone, length: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(length, backbone.hidden_size, generator=generator) * 0.5).requires_grad_()


def batch_of(backbone: Backbone, kind: Kind) -> Batch:
    return Examples(backbone, passage_len=(30, 60)).batch(kind, [TEXTS[0], "No!", TEXTS[7]], random.Random(0))


def row_of(batch: Batch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    context = batch["context_ids"].expand(3, -1)[row][batch["context_mask"].expand(3, -1)[row].bool()]
    return context, batch["reply_ids"][row][batch["reply_mask"][row].bool()]


@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_same_as_one_plain_forward(request: pytest.FixtureRequest, name: str, kind: Kind, position: Position) -> None:
    """Each row alone, unpadded, without a cache, in one pass over its embeddings."""
    backbone: Backbone = request.getfixturevalue(name)
    prompt, batch = soft_prompt(backbone), batch_of(backbone, kind)
    logits = reply_logits(backbone.model, prompt, batch, position)
    embed = backbone.model.get_input_embeddings()
    losses = []
    for row in range(3):
        context, reply = row_of(batch, row)
        parts = [prompt, embed(context)] if position == "front" else [embed(context), prompt]
        full = backbone.model(inputs_embeds=torch.cat([*parts, embed(reply)])[None]).logits[0]
        wanted = full[len(full) - len(reply) - 1 : -1]
        torch.testing.assert_close(logits[row, : len(reply)], wanted, rtol=1e-4, atol=5e-5)
        losses.append(functional.cross_entropy(wanted, reply, reduction="none"))
    loss = reply_loss(logits, batch)
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)  # the reply's tokens, no others
    (gradient,) = torch.autograd.grad(loss, prompt)
    (wanted_gradient,) = torch.autograd.grad(torch.cat(losses).mean(), prompt)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)


def test_front_is_pefts_layout() -> None:
    backbone = make_tiny_backbone("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = peft.get_peft_model(backbone.model, config)
    batch = Examples(backbone).batch("chat", [TEXTS[0]], random.Random(0))
    ids = torch.cat([batch["context_ids"], batch["reply_ids"]], dim=1)
    reply_len = batch["reply_ids"].shape[1]
    wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -reply_len - 1 : -1]
    ours = reply_logits(backbone.model, model.prompt_encoder["default"].embedding.weight, batch, "front")
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter(tiny_llama: Backbone, kind: Kind) -> None:
    prompt, batch = soft_prompt(tiny_llama), batch_of(tiny_llama, kind)
    loss = reply_loss(reply_logits(tiny_llama.model, prompt, batch, "reply"), batch)
    for ids, mask in (("context_ids", "context_mask"), ("reply_ids", "reply_mask")):
        batch[ids][batch[mask] == 0] = 77  # type: ignore[literal-required]
    assert torch.equal(loss, reply_loss(reply_logits(tiny_llama.model, prompt, batch, "reply"), batch))


@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("kind", KINDS)
def test_both_streams_read_the_context_once(tiny_llama: Backbone, kind: Kind, position: Position) -> None:
    """The detoxifier's logits are those of a pass of its own: nothing of the generator's reply is left in the cache."""
    prompt, batch = soft_prompt(tiny_llama), batch_of(tiny_llama, kind)
    detoxifier, _ = both_logits(tiny_llama.model, prompt, batch, position)
    torch.testing.assert_close(detoxifier, reply_logits(tiny_llama.model, prompt, batch, position))


@pytest.mark.parametrize("kind", KINDS)
def test_contrast_row_by_row(tiny_llama: Backbone, kind: Kind) -> None:
    """Each row alone, unpadded: its tokens' log-ratios summed, all divergences averaged; the first token only counts
    where a context predicts it."""
    prompt, batch = soft_prompt(tiny_llama), batch_of(tiny_llama, kind)
    found = contrast(*both_logits(tiny_llama.model, prompt, batch, "reply"), batch)
    embed, divergences = tiny_llama.model.get_input_embeddings(), []
    for row in range(3):
        context, reply = row_of(batch, row)
        first = 0 if len(context) else 1

        def log_p(*parts: torch.Tensor, reply: torch.Tensor = reply, first: int = first) -> torch.Tensor:
            full = tiny_llama.model(inputs_embeds=torch.cat([*parts, embed(reply)])[None]).logits[0]
            return full[-len(reply) - 1 + first : -1].log_softmax(-1)

        detox, gen = log_p(embed(context), prompt), log_p(embed(context))
        gained = (detox - gen).gather(-1, reply[first:, None]).sum()
        torch.testing.assert_close(found.log_ratio[row], gained, rtol=1e-4, atol=1e-4)
        divergences.append((gen.exp() * (gen - detox)).sum(-1))
    torch.testing.assert_close(found.divergence, torch.cat(divergences).mean(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.divergence, prompt)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_pair_loss() -> None:
    """ln 2 where the two are alike; it falls as the toxic text gains, and what both gain does not matter."""
    one, two = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
    assert pair_loss(one[:1], two[:1]).item() == pytest.approx(math.log(2))
    assert pair_loss(one[1:], two[1:]) < pair_loss(one[:1], two[:1])
    torch.testing.assert_close(pair_loss(one + 5, two + 5), pair_loss(one, two))


# 4. Whole runs


def settings(folder: Path, output: str = "out", **changes: Any) -> TrainingConfig:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    fields: dict[str, Any] = {
        "data": data,
        "output": folder / output,
        "virtual_tokens": 4,
        "steps": 12,
        "batch_size": 4,
        "reply_tokens": 12,
        "passage_tokens": (20, 40),
        "learning_rate": 0.5,
        "heldout": 6,
        "checkpoint_steps": 3,
        "licence": "CC0-1.0",
    }
    return TrainingConfig(**{**fields, **changes})


def quiet(step: int, steps: int, loss: float) -> None:
    """No progress bar in the tests."""


def train(config: TrainingConfig, backbone: Backbone | None = None) -> Detoxifier:
    return train_detoxifier(config, backbone=backbone or make_tiny_backbone("llama"), progress=quiet)


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


def pairs_file(folder: Path) -> Path:
    rows = [{"toxic": f"zzz qqq {text}", "neutral": [f"aaa eee {text}", "unused"]} for text in TEXTS]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"toxic": "alone"}\n')
    return path


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
import os, signal, sys
sys.path[:0] = {folders!r}
import test_training as t
def progress(step, steps, loss):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
t.train_detoxifier(t.settings(t.Path({folder!r})), backbone=t.make_tiny_backbone("llama"), progress=progress)
"""


def test_resume_after_a_kill(tmp_path: Path) -> None:
    code = KILLED.format(folders=[str(HERE), str(HERE.parent)], folder=str(tmp_path), step=8)
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
