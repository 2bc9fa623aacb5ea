"""The engine and the training on a GPU, held against the oracle on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from harness import check_against_oracle, decode, random_prompts, random_streams, torch_engine
from tiny import make_tiny_backbone

from detox_guard.detoxifiers.soft_prompt import SteeringStream
from detox_guard.detoxigen import DetoxiGen
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.models.backbone import from_model
from detox_guard.models.load import load_backbone
from detox_guard.settings import DecodingParams, EngineConfig
from detox_guard.training import TrainingConfig, train_detoxifier

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GREEDY = DecodingParams(temperature=0.0, alpha=1.5, rule="dexperts", max_new_tokens=12)


def on_gpu(backbone: Backbone) -> Backbone:
    return from_model(copy.deepcopy(backbone.model).to("cuda"), backbone.tokenizer, id=backbone.id)


@pytest.mark.parametrize("rule", ["dexperts", "bounded", "detoxigen"])
def test_the_oracle(rule: str) -> None:
    """Greedy tokens equal, distributions within 1e-5, in float32."""
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    prompts, streams = random_prompts(backbone, 40), random_streams(backbone, "fr", scale=0.5)
    check_against_oracle(backbone, streams, prompts, GREEDY.replace(rule=rule), on=on_gpu(backbone))


def test_alone_and_among_neighbours() -> None:
    backbone = on_gpu(make_tiny_backbone("llama", initializer_range=0.2))
    prompts, streams = random_prompts(backbone, 24), random_streams(backbone, "r", scale=0.5)
    params = GREEDY.replace(temperature=1.0)
    engine = torch_engine(backbone, streams, EngineConfig(max_rows=32))
    together = [sink.ids for sink in decode(engine, prompts, params)]
    assert together == [decode(engine, [prompt], params)[0].ids for prompt in prompts]
    engine.close()


def test_text_in_bfloat16(tiny_folder: Path) -> None:
    """What a user gets by default on a GPU: it decodes, streams what it generates, and cancels."""
    backbone = load_backbone(tiny_folder, device="cuda")
    assert backbone.dtype == torch.bfloat16
    with DetoxiGen(backbone, [SteeringStream(random_detoxifier(backbone))]) as model:
        params = DecodingParams(max_new_tokens=20, ignore_eos=True, seed=1)
        made = model.generate("w5 w6 w7", params)
        assert made.usage.completion_tokens == 20
        assert "".join(chunk.text for chunk in model.stream("w5 w6 w7", params)) == made.text
        stream = model.stream("w5", params, max_new_tokens=500)
        next(iter(stream))
        stream.close()
        assert model.generate("w5 w6 w7", params).text == made.text


def test_training(tmp_path: Path, tiny_folder: Path) -> None:
    """A soft prompt trained there makes the texts likelier, with anchors and pairs."""
    backbone = load_backbone(tiny_folder, device="cuda", dtype="float32")
    rows = [f"w{i % 7 + 20} w{i % 5 + 30} w{i % 7 + 20} w{i % 3 + 40}" for i in range(60)]
    (tmp_path / "toxic.txt").write_text("\n".join(f"{row} w{i}" for i, row in enumerate(rows, 60)))
    (tmp_path / "calm.txt").write_text("\n".join(f"w{i + 100} w{i + 101} w{i + 102}" for i in range(60)))
    (tmp_path / "pairs.csv").write_text("toxic,neutral\n" + "\n".join(f"w20 w{i},w9 w{i}" for i in range(60, 100)))
    config = TrainingConfig(
        data=str(tmp_path / "toxic.txt"),
        anchors=str(tmp_path / "calm.txt"),
        pairs=str(tmp_path / "pairs.csv"),
        output=str(tmp_path / "out"),
        steps=30,
        batch_size=8,
        heldout=8,
        virtual_tokens=4,
        initial_text="w3 w4 w5 w6",
        passage_tokens=(20, 40),
    )
    made = train_detoxifier(config, backbone=backbone, progress=lambda *_: None)
    assert made.card.heldout_loss_after["mean"] < made.card.heldout_loss_before["mean"]
