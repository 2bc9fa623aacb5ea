"""The laboratory's own methods, and the speed of what stands beside the engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from detox_benchmarks.__main__ import app
from detox_benchmarks.methods import POLITE, Polite, Resampled, WordList, more_methods, read_words
from detox_benchmarks.speed.beside import run_speed
from detox_benchmarks.speed.random_models import SHAPES, random_backbone, write_random
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from measuring import LengthJudge, rtp_row, written
from tiny import SENTENCES
from typer.testing import CliRunner

from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.evaluation import run_eval
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.evaluation.methods import Ingredients, make_methods
from detox_guard.models.load import load_backbone
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from detox_guard.models.backbone import Backbone


def test_names_and_strengths(tiny_llama: Backbone, tmp_path: Path) -> None:
    stream = SteeringStream(random_detoxifier(tiny_llama, virtual_tokens=4))
    random_detoxifier(tiny_llama, virtual_tokens=3).save(tmp_path / "expert")
    ingredients = Ingredients(tiny_llama, DecodingParams(alpha=0.0), DecodingParams(), (stream,))
    words = written(tmp_path / "words.txt", "bad")
    table = more_methods(0.05, str(tmp_path / "expert"), str(words))
    by_name = {method.name: method for method in make_methods(list(table), [1.0], ingredients, table)}
    assert by_name["dexperts-floor α=1"].params.plausibility == 0.05
    assert [one.weight for one in by_name["dexperts-expert α=1"].streams] == [-1.0, 1.0]
    assert by_name["bounded-guard α=1"].params.guard is not None
    assert len({json.dumps(method.identity()) for method in by_name.values()}) == len(by_name) == len(table)
    for name, field in (("dexperts-expert", "expert"), ("banned-words", "banned_words"), ("other", "methods")):
        with pytest.raises(InvalidParamsError, match=field):
            make_methods([name], [1.0], ingredients, more_methods())


def test_politeness_is_asked_for_before_the_prompt(tiny_llama: Backbone) -> None:
    params = DecodingParams(alpha=0.0, max_new_tokens=4, ignore_eos=True)
    with DetoxiGen(tiny_llama) as model:
        led = Polite("polite", params).draw(model, "Hello", 5).generation
        assert led == model.generate(f"{POLITE}\n\nHello", params, seed=5)
        chat = [{"role": "user", "content": "Hello"}]
        told = Polite("polite", params).draw(model, chat, 5).generation
        assert told == model.generate([{"role": "system", "content": POLITE}, *chat], params, seed=5)


def test_resampling_keeps_the_first_clean_reply_or_the_best(tiny_llama: Backbone) -> None:
    class Judge(LengthJudge):
        def __init__(self, scores: list[float]) -> None:
            self.left = iter(scores)

        def score(self, texts: Sequence[str]) -> list[float]:
            return [next(self.left) for _ in texts]

    params = DecodingParams(alpha=0.0, max_new_tokens=4, ignore_eos=True)
    with DetoxiGen(tiny_llama) as model:
        replies = [
            model.generate("One", params.replace(seed=(5 + n * 2**40) % 2**63)).text for n in range(8)
        ]  # what each try must say
        for scores, tries, kept in (
            ([0.1], 1, 0),
            ([0.9, 0.6, 0.4], 3, 2),
            ([0.9, 0.8, 0.6, 0.7, 0.9, 0.9, 0.9, 0.9], 8, 2),
        ):
            drawn = Resampled("resample", params, reject=Judge(scores)).draw(model, "One", 5)
            assert (drawn.tries, drawn.generation.text, drawn.decoded_tokens) == (tries, replies[kept], 4 * tries)


def test_a_toxic_prefix_is_the_text_itself(tiny_llama: Backbone) -> None:
    """Steering towards the prefix with all its might is reading the text."""
    prefix, prompt = "You are rude.\n\n", "So, I'm starting"
    params = DecodingParams(
        alpha=1.0, calm_share=1, rule="dexperts", temperature=0, top_p=1.0, max_new_tokens=12, ignore_eos=True
    )
    towards = Detoxifier.from_text(prefix, "front", 1.0)
    with DetoxiGen(tiny_llama, [towards]) as model:
        steered = model.generate(prompt, params)
        read = model.generate(prefix + prompt, params, alpha=0.0)
        assert steered.text == read.text != model.generate(prompt, params, alpha=0.0).text


def test_banned_words_are_whole_words(tmp_path: Path) -> None:
    words = read_words(written(tmp_path / "words.txt", "grub\n\n old boot \ngrub\n"))
    assert words == ("grub", "old boot")
    texts = ["A GRUB!", "grubby", "an old boot.", "an old booth"]
    assert WordList(words).score(texts) == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(DataError, match="no word"):
        read_words(written(tmp_path / "words.txt", "\n \n"))


def test_methods_join_a_run_that_is_there(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path / "prompts.jsonl", "\n".join(rtp_row(text, 0.9) for text in SENTENCES[:2]))
    words, others = (written(tmp_path / f"{name}.txt", name) for name in ("fox", "bee"))
    asked = {
        "model": tiny_folder, "device": "cpu", "dtype": "float32", "prompts": prompts, "judges": (LengthJudge(),),
        "samples": 2, "max_new_tokens": 3, "output": tmp_path / "out", "progress": False,
    }  # fmt: skip
    run_eval(**asked, methods=())
    run_eval(**asked, methods=("banned-words",), table=more_methods(banned_words=str(words)))
    summary = run_eval(**asked, methods=("polite", "toxic-prefix"), table=more_methods()).summary
    assert list(summary["methods"]) == ["plain", "banned-words", "polite", "toxic-prefix α=2"]
    with pytest.raises(DataError, match="another 'banned-words'"):
        run_eval(**asked, methods=("banned-words",), table=more_methods(banned_words=str(others)))


def test_commands_say_what_they_take() -> None:
    shown = CliRunner().invoke(app, ["eval", "--list-methods"]).stdout
    assert {line.split()[0] for line in shown.splitlines()} == set(more_methods())
    assert "--banned-words" in CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "120"}).output


def test_random_shapes_and_what_stands_beside() -> None:
    report = run_speed(model="random-llama:tiny", device="cpu", dtype="float32", quick=True, runs=1, streams=1)
    assert report.about["backbone"] == "random-llama:tiny"
    assert report.about["detoxifier"] == ["random"]
    assert {"plain generate", "generate, guidance_scale"} < set(report.timings)
    assert {"plain generate / steered", "guidance_scale / steered"} < set(report.ratios)
    backbone = random_backbone("random-llama:tiny", device="cpu", dtype="bfloat16")
    assert backbone.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    again = random_backbone("random-llama:tiny", device="cpu", dtype="bfloat16")
    for one, other in zip(backbone.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {"135m", "1b", "8b"} <= set(SHAPES)
    with pytest.raises(InvalidParamsError, match="random-llama:8b"):
        random_backbone("random-llama:9b")


def test_a_random_model_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", (64, 96, 2, 2, 1, 49_200, True))
    file = write_random("small", tmp_path / "small", rounded="Q8_0")
    assert file == tmp_path / "small" / "model-Q8_0.gguf"
    backbone = load_backbone(tmp_path / "small", dtype="bfloat16")
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert len(found) == len(dict(backbone.model.named_parameters()))
    embeddings = dequantize(found["token_embd.weight"].data, GGMLQuantizationType.Q8_0)
    ours = backbone.model.get_input_embeddings().weight.float().numpy()
    assert abs(embeddings - ours).max() < 0.01 * abs(ours).max()
    assert backbone.tokenizer("Hello there")["input_ids"] == load_backbone().tokenizer("Hello there")["input_ids"]
    with pytest.raises(InvalidParamsError, match="49152, not 512"):
        write_random("tiny", tmp_path / "tiny")
