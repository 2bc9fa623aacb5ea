"""Ablations: other weights as a detoxifier, their training and their replies, and whole runs on tiny models."""

from __future__ import annotations

import copy
import io
import json
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from detox_benchmarks.__main__ import app
from detox_benchmarks.ablations import weights
from detox_benchmarks.ablations.run import run_ablation
from detox_benchmarks.ablations.tables import AblationReport
from detox_benchmarks.ablations.two_models import decode_pair
from detox_benchmarks.ablations.variants import AblationConfig, make_variants
from detox_benchmarks.ablations.weights import (
    bytes_of,
    heldout_loss,
    load_weights,
    scored,
    train_weights,
    weights_logits,
)
from rich.console import Console
from tiny import SENTENCES, TEXTS, make_tiny_backbone
from torch.nn import functional
from typer.testing import CliRunner

from detox_guard._reply import Reply
from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError, DetoxGuardError, InvalidParamsError, UnsupportedBackboneError
from detox_guard.evaluation import EvalReport
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.evaluation.methods import Method
from detox_guard.settings import DecodingParams
from detox_guard.steering.contrast import RULES
from detox_guard.steering.forced import reply_loss
from detox_guard.steering.sampling import nuclei
from detox_guard.training.examples import KINDS, Batch, Examples, Kind

if TYPE_CHECKING:
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
    return [Reply(backbone, prompt, params.replace(seed=i)) for i, prompt in enumerate(SENTENCES)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.5}, {"temperature": 0.0}])
def test_a_second_model_that_is_the_first_changes_no_token(kind: Any, rule: Any, sampling: dict[str, Any]) -> None:
    """What the engine says without steering, to the token, whoever shares the batch."""
    backbone = make_tiny_backbone(kind)
    ends = tuple(range(4, 480, 20))
    steered = DecodingParams(alpha=2.0, rule=rule, max_new_tokens=24, stop_token_ids=ends, **sampling)
    made = decode_pair(backbone, copy.deepcopy(backbone.model), fresh(backbone, steered))
    with DetoxiGen(backbone) as guard:
        plain = guard.batch(SENTENCES, [steered.replace(alpha=0.0, seed=i) for i in range(len(SENTENCES))])
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
    one = torch.ones(1)
    for prompt, made in zip(SENTENCES, strong, strict=True):
        ids = list(backbone.tokenizer(prompt)["input_ids"])
        for token in made.trace.tokens:
            with torch.inference_mode():
                gen, detox = (m(torch.tensor([ids])).logits[:, -1].log_softmax(-1) for m in (backbone.model, other))
            ((_, nuc),) = nuclei(gen, one * 0.9, torch.zeros(1, dtype=torch.long))
            p = RULES[rule](nuc.log_p, detox.gather(-1, nuc.ids).unsqueeze(1), -one, 20.0 * one, nuc.keep).p
            assert token.token_id == int(nuc.ids[0, p.argmax()])
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
        [alone] = decode_pair(tiny_llama, other, [Reply(tiny_llama, prompt, params.replace(stop=(stop,), seed=i))])
        assert alone.text == made[i].text == texts[i].partition(stop)[0]


# 3. Whole runs


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


# 4. What is refused, and the command line


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
