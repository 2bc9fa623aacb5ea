"""Other weights as a detoxifier: their logits, their training, and their replies."""

from __future__ import annotations

import copy
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from detox_benchmarks.ablations import weights
from detox_benchmarks.ablations.two_models import decode_pair
from detox_benchmarks.ablations.weights import (
    bytes_of,
    heldout_loss,
    load_weights,
    scored,
    train_weights,
    weights_logits,
)
from tiny import SENTENCES, TEXTS, make_tiny_backbone
from torch.nn import functional

from detox_guard._reply import Reply, Speaker
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DetoxGuardError, UnsupportedBackboneError
from detox_guard.settings import DecodingParams
from detox_guard.steering.contrast import RULES
from detox_guard.steering.forced import reply_loss
from detox_guard.steering.sampling import nucleus
from detox_guard.training.examples import KINDS, Batch, Examples, Kind

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone

ROWS = ["Word", *TEXTS[:3]]
"""One without a space, so that it has no context when it is split."""


def batch_of(backbone: Backbone, kind: Kind, texts: list[str] = ROWS) -> Batch:
    examples = Examples(backbone, reply_len=12, passage_len=(20, 40))
    return examples.batch(kind, texts, random.Random(0))


def quiet(step: int, steps: int, loss: float) -> None:
    """No bar in the tests."""


# 1. Other weights: logits, loss, training


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_logits_row_by_row(backbone: Any, kind: Kind) -> None:
    """Each row alone, unpadded, in one pass without a cache."""
    tiny = make_tiny_backbone(backbone)
    batch = batch_of(tiny, kind)
    counted, logits = scored(batch), weights_logits(tiny.model, batch)
    assert logits.shape == (*batch["reply_ids"].shape, tiny.vocab_size)
    assert logits.isfinite().all()
    losses = []
    for row in range(len(ROWS)):
        at = row if len(batch["context_ids"]) > 1 else 0
        context = batch["context_ids"][at][batch["context_mask"][at].bool()]
        count = int(batch["reply_mask"][row].sum())
        reply = batch["reply_ids"][row, :count]
        alone = tiny.model(input_ids=torch.cat([context, reply])[None]).logits[0]
        skipped = 0 if len(context) else 1
        assert int(counted["reply_mask"][row].sum()) == count - skipped
        wanted = alone[len(context) - 1 + skipped : -1]
        torch.testing.assert_close(logits[row, skipped:count], wanted, rtol=1e-4, atol=1e-4)
        losses.append(functional.cross_entropy(wanted, reply[skipped:], reduction="none"))
    torch.testing.assert_close(reply_loss(logits, counted), torch.cat(losses).mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_logits_teach_the_context_too(tiny_llama: Backbone, kind: Kind) -> None:
    """The gradient is that of one pass over context and reply, the shared context's part included, and finite."""
    model, batch = tiny_llama.model.requires_grad_(True), batch_of(tiny_llama, kind)
    weight = model.get_submodule("model.layers.0.self_attn.k_proj").weight
    (found,) = torch.autograd.grad(reply_loss(weights_logits(model, batch), scored(batch)), weight)
    nats, count = torch.zeros(()), 0
    for row, mask in enumerate(batch["reply_mask"]):
        at = row if len(batch["context_ids"]) > 1 else 0
        context = batch["context_ids"][at][batch["context_mask"][at].bool()]
        reply = batch["reply_ids"][row, : int(mask.nonzero().max()) + 1]
        first = 0 if len(context) else 1
        alone = model(input_ids=torch.cat([context, reply])[None]).logits[0, len(context) - 1 + first : -1]
        nats = nats + functional.cross_entropy(alone, reply[first:], reduction="sum")
        count += len(reply) - first
    (wanted,) = torch.autograd.grad(nats / count, weight)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_a_word_that_nothing_predicts(tiny_llama: Backbone) -> None:
    batch = batch_of(tiny_llama, "bare", ["a"])
    assert not scored(batch)["reply_mask"].any()
    assert weights_logits(tiny_llama.model, batch).shape == (1, 1, tiny_llama.vocab_size)
    examples = Examples(tiny_llama, reply_len=1, passage_len=(20, 40))
    found = heldout_loss(
        partial(weights_logits, tiny_llama.model), examples, ["a", "b"], rows=1, seed=0, device=tiny_llama.device
    )
    assert 0 < found < float("inf")


def train_tiny(backbone: Backbone, tuning: Any, folder: Path, **changes: Any) -> Any:
    asked: dict[str, Any] = {
        "steps": 20,
        "learning_rate": 1e-2,
        "rank": 4,
        "seed": 0,
        "folder": folder,
        "progress": quiet,
    }
    return train_weights(tuning, backbone, lambda _: batch_of(backbone, "split"), **{**asked, **changes})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_training_learns_saves_and_leaves_the_backbone_alone(tmp_path: Path, tuning: Any, kind: Any) -> None:
    backbone = make_tiny_backbone(kind, initializer_range=0.1)
    kept = copy.deepcopy(backbone.model.state_dict())
    batch = batch_of(backbone, "split")
    trained = train_tiny(backbone, tuning, tmp_path)
    before, after = (
        float(reply_loss(weights_logits(m, batch), scored(batch))) for m in (backbone.model, trained.model)
    )
    assert after < before - 0.5
    now = backbone.model.state_dict()
    assert now.keys() == kept.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    everything = sum(parameter.numel() for parameter in backbone.model.parameters())
    assert trained.parameters == everything if tuning == "full" else 0 < trained.parameters < everything / 2

    loaded = load_weights(tuning, tmp_path, backbone)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(
        weights_logits(loaded, batch), weights_logits(trained.model, batch), rtol=1e-4, atol=1e-4
    )
    assert train_tiny(backbone, tuning, tmp_path / "again").sha256 == trained.sha256
    assert train_tiny(backbone, tuning, tmp_path / "less", steps=3).sha256 != trained.sha256


def test_training_that_cannot_be(tiny_llama: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DetoxGuardError, match="the loss is"):
        train_tiny(tiny_llama, "full", tmp_path, learning_rate=1e38)
    monkeypatch.setattr(weights, "_ATTENTION", weights.re.compile("no such layer"))
    with pytest.raises(UnsupportedBackboneError, match="attention"):
        train_tiny(tiny_llama, "lora", tmp_path)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_bytes_are_what_the_optimizer_holds(
    tiny_llama: Backbone, tmp_path: Path, tuning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    class Weighed(torch.optim.AdamW):
        def zero_grad(self, set_to_none: bool = True) -> None:
            tensors = [p for group in self.param_groups for p in group["params"]]
            tensors += [p.grad for p in tensors if p.grad is not None]
            tensors += [m for one in self.state.values() for m in (one["exp_avg"], one["exp_avg_sq"])]
            held.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
            super().zero_grad(set_to_none)

    monkeypatch.setattr(torch.optim, "AdamW", Weighed)
    trained = train_tiny(tiny_llama, tuning, tmp_path, steps=2)
    assert held[-1] == bytes_of(trained.parameters, torch.bfloat16)["training"]
    assert bytes_of(trained.parameters, torch.bfloat16)["serving"] == 2 * trained.parameters


# 2. Two models


def fresh(backbone: Backbone, params: DecodingParams) -> list[Reply]:
    return [Reply(Speaker(backbone), prompt, params.replace(seed=i)) for i, prompt in enumerate(SENTENCES)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.5}, {"temperature": 0.0}])
def test_a_second_model_that_is_the_first_changes_no_token(kind: Any, rule: Any, sampling: dict[str, Any]) -> None:
    """What the engine says without steering, to the token, whoever shares the batch."""
    backbone = make_tiny_backbone(kind)
    ends = tuple(range(4, 480, 20))
    steered = DecodingParams(alpha=2.0, rule=rule, max_new_tokens=24, stop_token_ids=ends, **sampling)
    made = decode_pair(backbone, copy.deepcopy(backbone.model), fresh(backbone, steered))
    with DetoxiGen(backbone) as model:
        plain = model.batch(SENTENCES, [steered.replace(alpha=0.0, seed=i) for i in range(len(SENTENCES))])
    assert [one.text for one in made] == [one.text for one in plain]
    for one, other in zip(made, plain, strict=True):
        assert (one.finish_reason, one.usage, one.seed) == (other.finish_reason, other.usage, other.seed)
        assert one.trace is not None
        assert other.trace is not None
        assert [token.token_id for token in one.trace.tokens] == [token.token_id for token in other.trace.tokens]
        assert all(token.kl_detoxifier < 1e-5 for token in one.trace.tokens)
    assert len({one.usage.completion_tokens for one in made}) > 1  # some end before the others


@pytest.mark.parametrize("rule", list(RULES))
def test_alpha_matters_when_it_is_another(rule: Any) -> None:
    """Greedy, each token is the best of the rule on two plain passes over what was said before it."""
    backbone = make_tiny_backbone("llama", initializer_range=0.2)  # flat enough to be steered
    other = make_tiny_backbone("llama", seed=1, initializer_range=0.2).model

    def replies(alpha: float) -> Any:
        params = DecodingParams(
            alpha=alpha, calm_share=1, rule=rule, temperature=0.0, max_new_tokens=10, ignore_eos=True
        )
        return decode_pair(backbone, other, fresh(backbone, params))

    weak, strong = replies(0.1), replies(20.0)
    assert [one.text for one in weak] != [one.text for one in strong]
    for prompt, made in zip(SENTENCES, strong, strict=True):
        ids = list(backbone.tokenizer(prompt)["input_ids"])
        for token in made.trace.tokens:
            with torch.inference_mode():
                gen, detox = (m(torch.tensor([ids])).logits[:, -1].log_softmax(-1) for m in (backbone.model, other))
            nuc = nucleus(gen[0].numpy(), 0.9, 0)
            p = RULES[rule](nuc.log_p, detox[:, nuc.ids].double().numpy(), np.array([-1.0]), 20.0).p
            assert token.token_id == int(nuc.ids[p.argmax()])
            ids.append(token.token_id)


def test_stop_strings_and_neighbours(tiny_llama: Backbone) -> None:
    """A reply that is over early, and whose neighbours go on, is what it is alone."""
    other = make_tiny_backbone("llama", seed=1).model
    params = DecodingParams(alpha=1.0, max_new_tokens=16, ignore_eos=True)
    texts = [one.text for one in decode_pair(tiny_llama, other, fresh(tiny_llama, params))]
    stop = texts[0][len(texts[0]) // 2 :][:2]
    made = decode_pair(tiny_llama, other, fresh(tiny_llama, params.replace(stop=(stop,))))
    assert made[0].text == texts[0].partition(stop)[0]
    assert made[0].finish_reason == "stop"
    for i, prompt in enumerate(SENTENCES):
        [alone] = decode_pair(
            tiny_llama, other, [Reply(Speaker(tiny_llama), prompt, params.replace(stop=(stop,), seed=i))]
        )
        assert alone.text == made[i].text == texts[i].partition(stop)[0]
