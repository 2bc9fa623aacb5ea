"""Training: layouts, and the teacher-forced pass over them."""

from __future__ import annotations

import math
import random
import warnings
from typing import TYPE_CHECKING, Any, get_args

import peft
import pytest
import torch
from tiny import TEXTS, make_tiny_backbone
from torch.nn import functional

from detox_guard.detoxifiers.card import Position
from detox_guard.steering.forced import both_logits, contrast, pair_loss, reply_logits, reply_loss
from detox_guard.training.data import Prompted
from detox_guard.training.examples import KINDS, Batch, Examples, Kind, Steps, rows_of, texts_for
from detox_guard.training.rows import divide

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from detox_guard.models.backbone import Backbone
from training_kit import settings

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
    own, whole = Prompted("The bus", " is late"), "The bus is late"
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
    answer = Prompted("The bus", "is late", chat=True)
    assert tokenizer.decode(examples.batch("passage", [answer], random.Random(0))["reply_ids"][0]) == "is late"
    batch = examples.batch("chat", [answer, whole], random.Random(0))
    turns = tokenizer.batch_decode(batch["context_ids"])
    assert "<|im_start|>user\nThe bus<|im_end|>" in turns[0]
    assert "The bus<|im_end|>" not in turns[1]
    assert all(turn.endswith("<|im_start|>assistant\n") for turn in turns)
    assert tokenizer.decode(batch["reply_ids"][0], skip_special_tokens=True) == "is late"


def test_each_kind_of_batch_takes_the_texts_that_fit() -> None:
    """A continuation behind its prompt, an answer behind its question; whatever there is where nothing fits."""
    plain, continued, answer = "Late.", Prompted("The bus", " is late"), Prompted("How is it?", "Late.", chat=True)
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
    pairs = [(Prompted(f"P{i}", f" bad {j}"), Prompted(f"P{i}", " good")) for i in range(10) for j in range(4)]
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
