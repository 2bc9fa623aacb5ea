"""llama.cpp as a runner: what it serves, what it refuses by name, and that a reply depends on nobody beside it.

The engine's invariants are held over it as over every runner; here is what is its own.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import Recorder, contexts_of, decode, random_detoxifier, random_ids, random_streams, request
from kits import EXACT, NO_LLAMACPP, has_llamacpp
from reference import Reference
from tiny_gguf import make_tiny_gguf
from watched import Watched

from detox_guard import DecodingParams, DetoxiGen, GuardPolicy, SteeringStream
from detox_guard.engine import End, Rewind, Scheduler
from detox_guard.errors import (
    BackboneError,
    BackboneNotFoundError,
    DetoxifierMismatchError,
    InvalidParamsError,
    UnsupportedBackboneError,
)
from detox_guard.models.load import load_backbone
from detox_guard.settings import EngineConfig
from detox_guard.testing import ScriptedScorer

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone

pytestmark = [pytest.mark.skipif(not has_llamacpp, reason=NO_LLAMACPP), pytest.mark.usefixtures("own_cache")]
SAMPLED = DecodingParams(temperature=1.0, alpha=1.5, max_new_tokens=24)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> tuple[Path, Any]:
    """A file, and the torch model that was written into it."""
    file = folder / "tiny-llama.F32.gguf"
    return file, make_tiny_gguf(file, initializer_range=0.2)


def _engine(backbone: Backbone, views: str, **bounds: Any) -> Scheduler:
    from detox_guard.engine.llamacpp.runner import LlamaRunner

    config = EngineConfig(**bounds)
    return Scheduler(LlamaRunner(backbone, random_streams(backbone, views), config), config)


@pytest.mark.parametrize("views", ["t", "b", "e", "s", "fse", "rT"])
def test_text_views_equal_the_oracle(tiny: tuple[Path, Any], views: str) -> None:
    backbone = load_backbone(tiny[0], **EXACT)
    streams = random_streams(backbone, views)
    oracle = Reference.of(tiny[1], streams)
    engine = _engine(backbone, views, max_rows=16, prefill_chunk=16)
    params = SAMPLED.replace(max_new_tokens=8)
    prompts = random_ids(backbone.vocab_size, 5, longest=70)
    for prompt, sink in zip(prompts, decode(engine, prompts, params, keep=True, views=streams), strict=True):
        expected, unsure = oracle.distributions(prompt, sink.ids, params, contexts_of(prompt, streams))
        for step, ref, close in zip(sink.steps, expected, unsure, strict=True):
            assert step.distribution is not None
            ids, p = step.distribution
            dense = torch.zeros_like(ref).scatter_(0, ids, p.double())
            assert close or (dense - ref).abs().max() <= 1e-5
    engine.close()


@pytest.mark.parametrize(("views", "spared"), [("fbSeT", 3), ("fsssssss", 4)])
def test_rows_of_views_go_on_from_another_prompt(tiny: tuple[Path, Any], views: str, spared: int) -> None:
    """`spared`: rows that begin with a block of what the prompt before had; two of seven contexts have."""
    from detox_guard.engine.llamacpp.runner import LlamaRunner

    backbone = load_backbone(tiny[0], **EXACT)
    streams = random_streams(backbone, views)
    beginning = random_ids(backbone.vocab_size, 1, shortest=80, longest=80)[0]
    prompts = [beginning + own for own in random_ids(backbone.vocab_size, 3, shortest=9, longest=9)]
    replies, columns = [], []
    for cached in (0, 10_000):
        config = EngineConfig(max_rows=16, prompt_cache_slots=cached)
        runner = Watched(LlamaRunner(backbone, streams, config))
        engine = Scheduler(runner, config)
        replies.append([decode(engine, [prompt], SAMPLED, views=streams)[0].ids for prompt in prompts])
        columns.append(runner.columns)
        engine.close()
    assert replies[0] == replies[1]
    whole = columns[0][0]
    assert columns == [[whole] * 3, [whole, whole - 64 * spared, whole - 64 * spared]]


@pytest.mark.parametrize(
    ("rounded", "cache"), [(None, {}), ("Q8_0", {}), ("Q4_0", {}), ("Q4_1", {"type_k": "q8_0", "type_v": "q8_0"})]
)
def test_a_reply_is_bit_for_bit_the_same_alone_and_among_sixteen_rows(
    folder: Path, rounded: str | None, cache: dict[str, str]
) -> None:
    """With neighbours who join, leave, park and rewind, in the library's own number types."""
    file = folder / f"many-{rounded}.gguf"
    # Heads of 32: what is cached is rounded in blocks of 32 too.
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    make_tiny_gguf(file, rounded=rounded, initializer_range=0.2, **shape)
    backbone = load_backbone(file, engine="llamacpp", n_threads=2, **cache)
    prompts = random_ids(backbone.vocab_size, 14, longest=90)
    alone_engine = _engine(backbone, "r", max_rows=16, prompt_cache_slots=0)
    alone = [decode(alone_engine, [prompt], SAMPLED, keep=True)[0].steps for prompt in prompts]
    alone_engine.close()
    engine = _engine(backbone, "r", max_rows=16, prompt_cache_slots=0, prefill_chunk=64)
    dice, pairs = random.Random(3), []
    for index, prompt in enumerate(prompts):
        at, back = dice.randint(2, 20), dice.randint(1, 3)
        left = [Rewind(back)]
        sink = Recorder(lambda step, at=at, left=left: left.pop() if step.index == at and left else None)
        if index % 3 == 0:
            answers: list[Any] = [None, None, End("length")]
            sink.on_end = lambda reason, answers=answers: answers.pop(0)  # type: ignore[method-assign]
        pairs.append((at, back, request(prompt, SAMPLED, sink, keep=True)))
    for _, _, (req, _) in pairs:
        engine.submit(req)
    for (at, back, (_, sink)), expected in zip(pairs, alone, strict=True):
        steps = sink.wait().steps
        kept = [*steps[: at + 1 - back], *steps[at + 1 :]]
        assert [step.token_id for step in kept] == [step.token_id for step in expected]
        for step, one in zip(kept, expected, strict=True):
            assert step.distribution is not None
            assert one.distribution is not None
            assert torch.equal(step.distribution[1], one.distribution[1])
    engine.close()


def test_a_long_prompt_is_given_up_between_blocks(tiny: tuple[Path, Any]) -> None:
    from detox_guard.engine.base import PromptIds
    from detox_guard.engine.llamacpp.runner import LlamaRunner

    backbone = load_backbone(tiny[0], **EXACT)
    runner = LlamaRunner(backbone, random_streams(backbone, "r"), EngineConfig())
    asked: list[bool] = []
    prompts = [PromptIds(tuple(random_ids(480, 1, shortest=400, longest=400)[0]), True)]
    prefill = runner.begin(prompts)
    assert not prefill.advance(1000, lambda: asked.append(len(asked) == 2) or asked[-1])
    assert prefill.left == 405 - 2 * 64
    # Another takes its turn, and the first one goes on as if nobody had.
    short = runner.begin([PromptIds((5, 6, 7), True)])
    assert short.advance(100, lambda: False)
    assert prefill.advance(1000, lambda: False)
    with torch.inference_mode():
        whole = runner.begin(prompts)
        assert whole.advance(1000, lambda: False)
        assert torch.equal(prefill.finish()[0].logits, whole.finish()[0].logits)
    runner.close()


def test_a_guarded_model_of_a_gguf(tiny: tuple[Path, Any]) -> None:
    """Everything above the runner: text, seeds, a guard, a chat, both named and traced."""
    backbone = load_backbone(tiny[0], **EXACT)
    assert (backbone.id, backbone.hidden_size, backbone.num_layers) == ("tiny-llama.F32.gguf", 48, 3)
    assert backbone.identity["engine"] == "llamacpp"
    stream = SteeringStream(random_detoxifier(backbone))
    with DetoxiGen(
        backbone, [stream], params=SAMPLED.replace(guard=GuardPolicy(scorer=ScriptedScorer("zzz")), seed=4)
    ) as model:
        first, again = model.generate("So, what now?"), model.generate("So, what now?")
        assert first.text == again.text
        assert "".join(chunk.text for chunk in model.stream("So, what now?")) == first.text
        assert model.generate([{"role": "user", "content": "Hello"}], alpha=0.0).text
        assert model.stats().rows == 0


def test_the_same_text_as_torch_at_the_same_seed(tiny: tuple[Path, Any]) -> None:
    with (
        DetoxiGen.from_pretrained(tiny[0], **EXACT) as mine,
        DetoxiGen.from_pretrained(tiny[0], dtype="float32", device="cpu") as theirs,
    ):
        params = SAMPLED.replace(seed=5)
        prompts = ["The quick brown fox", "What a", "You are"]
        found, expected = mine.batch(prompts, params), theirs.batch(prompts, params)
        assert [one.text for one in found] == [one.text for one in expected]


def test_a_detoxifier_is_matched_by_the_names_in_the_file(folder: Path) -> None:
    file = folder / "sha256-00ff"
    make_tiny_gguf(file, name="Tiny Llama 7 Instruct")
    backbone = load_backbone(file, engine="llamacpp")
    detoxifier = random_detoxifier(backbone)
    named = replace(detoxifier, card=detoxifier.card.model_copy(update={"base_id": "org/Tiny-Llama-7-Instruct"}))
    named.validate(backbone)
    other = replace(detoxifier, card=detoxifier.card.model_copy(update={"base_id": "org/Tiny-Llama-8"}))
    with pytest.raises(DetoxifierMismatchError, match="trained for"):
        other.validate(backbone)


def test_damaged_and_foreign_files_are_named(tiny: tuple[Path, Any], folder: Path) -> None:
    whole = tiny[0].read_bytes()
    for name, content in {
        "cut.gguf": whole[: len(whole) // 2],
        "head.gguf": whole[:200],
        "noise.gguf": b"GGUF" + os.urandom(4000),
        "changed.gguf": whole.replace(b"attn_q.weight", b"attn_w.weight"),
        "nan.gguf": whole[: -48 * 480 * 4] + b"\xff" * (48 * 480 * 4),
    }.items():
        (folder / name).write_bytes(content)
        with pytest.raises(BackboneError, match=name.removesuffix(".gguf")):
            load_backbone(folder / name, engine="llamacpp")
    (folder / "text.gguf").write_text("no model")
    with pytest.raises(BackboneError, match="not a GGUF"):
        load_backbone(folder / "text.gguf", engine="llamacpp")
    (folder / "plain").mkdir()
    (folder / "plain" / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match="no GGUF file"):
        load_backbone(folder / "plain", engine="llamacpp")


def test_what_is_not_served_is_refused_by_name(tiny: tuple[Path, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=r"n_ctx.*at most 512"):
        load_backbone(tiny[0], engine="llamacpp", n_ctx=513)
    backbone = load_backbone(tiny[0], engine="llamacpp", n_ctx=100)
    assert backbone.gguf is not None
    with DetoxiGen(backbone) as model:
        assert model.context_window == 100
    # As of a model whose positions have several parts, say.
    without = replace(backbone.gguf, facts=backbone.gguf.facts.model_copy(update={"embedding_factor": None}))
    detoxifier = random_detoxifier(backbone)
    with pytest.raises(UnsupportedBackboneError, match="soft prompt"):
        DetoxiGen(replace(backbone, gguf=without), [SteeringStream(detoxifier)])
    with pytest.raises(UnsupportedBackboneError, match="no weights"):
        backbone.model.get_input_embeddings()


def test_an_ollama_model_is_found_by_its_manifest(
    tiny: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    digest = "sha256:" + "0a" * 32
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "1b"
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "1b" * 32},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest},
    ]
    manifest.write_text(json.dumps({"layers": layers}))
    with pytest.raises(BackboneNotFoundError, match="its file is missing"):
        load_backbone("ollama:tiny:1b", engine="llamacpp")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / digest.replace(":", "-")).write_bytes(tiny[0].read_bytes())
    backbone = load_backbone("ollama:tiny:1b", engine="llamacpp")
    assert backbone.id == "tiny"
    assert "tiny-llama" in backbone.also_called
    with pytest.raises(BackboneNotFoundError, match="no such Ollama model"):
        load_backbone("ollama:tiny", engine="llamacpp")
    for bad in ("ollama:", "ollama:../x", "ollama:a/b/c/d"):
        with pytest.raises(BackboneNotFoundError, match="no name of an Ollama model"):
            load_backbone(bad, engine="llamacpp")
