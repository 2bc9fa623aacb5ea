"""Models that llama.cpp serves, above the engine: their tokenizers, likelihoods, figures, commands and names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from commands import run
from harness import random_ids
from kits import EXACT, NO_LLAMACPP, has_llamacpp
from tiny_gguf import make_tiny_gguf

from detox_guard.errors import InvalidParamsError, PromptTooLongError
from detox_guard.evaluation import run_bench, run_eval
from detox_guard.evaluation.lms import LMJudge, reply_nll
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.skipif(not has_llamacpp, reason=NO_LLAMACPP), pytest.mark.usefixtures("own_cache")]


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    file = folder / "tiny-llama.F32.gguf"
    make_tiny_gguf(file, initializer_range=0.2)
    return file


def test_a_tokenizer_is_kept_and_read_without_the_models_config(file: Path, folder: Path) -> None:
    texts = ["So, what now?", "<|im_start|>user\nHello\n\n2 dogs<|im_end|>", " Über  naïve\t😀"]
    messages = [{"role": "user", "content": "Hello"}]
    made, kept = (load_backbone(file, **EXACT).tokenizer for _ in range(2))
    assert [made(text)["input_ids"] for text in texts] == [kept(text)["input_ids"] for text in texts]
    assert [made.decode(ids) for ids in made(texts)["input_ids"]] == texts
    assert made.apply_chat_template(messages, tokenize=False) == kept.apply_chat_template(messages, tokenize=False)
    assert (made.eos_token_id, made.pad_token_id, len(made)) == (kept.eos_token_id, kept.pad_token_id, len(kept))
    (place,) = (folder / "cache" / "gguf").glob("*-tokenizer-*")
    (place / "tokenizer.json").write_text("{")  # a damaged one is made anew
    assert load_backbone(file, **EXACT).tokenizer("So")["input_ids"] == made("So")["input_ids"]


def test_likelihoods_are_those_of_torch(file: Path) -> None:
    mine, theirs = load_backbone(file, **EXACT), load_backbone(file, dtype="float32", device="cpu")
    replies = [*random_ids(mine.vocab_size, 20, shortest=1, longest=9), []]
    judge = LMJudge(mine, own=True)
    for prompt in ("So, what now?", [{"role": "user", "content": "Tell me"}]):
        found = judge.judge(prompt, [""] * len(replies), replies)
        expected = LMJudge(theirs, own=True).judge(prompt, [""] * len(replies), replies)
        assert [count for _, count in found] == [count for _, count in expected]
        assert torch.tensor([nats for nats, _ in found]).allclose(
            torch.tensor([nats for nats, _ in expected]), atol=1e-3, rtol=1e-5
        )
    ids = theirs.tokenizer("So")["input_ids"]
    assert judge.judge("So", [""], replies[:1])[0][0] == pytest.approx(reply_nll(theirs, ids, replies[:1])[0], abs=1e-3)
    with pytest.raises(PromptTooLongError, match="512 tokens"):
        judge.judge("So", [""], [[5] * 520])


def test_an_evaluation_is_of_what_was_loaded(file: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("So, what now?\nYou are\n")
    asked: dict[str, Any] = {
        "prompts": tmp_path / "prompts.txt", "model": file, "methods": (), "samples": 2, "max_new_tokens": 4,
        "output": tmp_path / "run", "progress": False,
    }  # fmt: skip
    summary = run_eval(**asked, **EXACT).summary
    assert (summary["engine"], summary["type_k"], summary["flash_attn"]) == ("llamacpp", "f32", "False")
    assert "backbone" in summary["lm_judges"]
    for other in ({}, {**EXACT, "type_k": "f16"}):
        with pytest.raises(Exception, match="holds a run of another"):
            run_eval(**asked, **other)


def test_a_bench_of_a_gguf(file: Path) -> None:
    report = run_bench(model=file, detoxifier="random", quick=True, context=20, **EXACT)
    assert report.about["engine"] == "llamacpp"
    assert report.timings["engine, steered"]["ms_per_token"] > 0


def test_commands_take_what_llamacpp_takes(file: Path, tmp_path: Path) -> None:
    loaded = ("--model", file, "--engine", "llamacpp", "--n-threads", "1", "--n-ctx", "256", "--type-k", "f32")
    done = run("generate", "So, what now?", "--seed", "1", "--max-new-tokens", "6", "--json", *loaded)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 6, done.stderr
    facts = json.loads(run("info", "--json", *loaded).stdout)
    assert facts["backbone"]["id"] == file.name
    (tmp_path / "prompts.txt").write_text("So, what now?\n")
    done = run(
        "eval", "--prompts", tmp_path / "prompts.txt", "--samples", "1", "--max-new-tokens", "3", "--json", *loaded
    )
    assert json.loads(done.stdout)["eval"]["engine"] == "llamacpp", done.stderr
    done = run("adapt", file, "--engine", "llamacpp")
    assert done.exit_code == 2
    for words, said in (("--n-ctx 999999", "n_ctx"), ("--device cpu", "device"), ("--quantize int8", "quantiz")):
        done = run("generate", "So", "--model", file, "--engine", "llamacpp", *words.split())
        assert (done.exit_code, said in done.stderr) == (2, True)


def test_training_on_llamacpp_is_refused_by_name(tmp_path: Path) -> None:
    from detox_guard.training.config import AdaptConfig, TrainingConfig

    for config in (AdaptConfig, TrainingConfig):
        with pytest.raises(InvalidParamsError, match=r"engine.*gradients"):
            config(data=("x",), output=str(tmp_path), engine="llamacpp")
