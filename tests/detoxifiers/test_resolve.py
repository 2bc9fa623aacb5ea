"""What `detoxifier="auto"` comes to, and a newcomer's one line."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from harness import random_detoxifier
from safetensors.torch import save_file

from detox_guard import Detoxifier, DetoxiGen, SteeringStream
from detox_guard.detoxifiers import registry
from detox_guard.detoxifiers.resolve import UNTRAINED, as_streams
from detox_guard.errors import DetoxifierMismatchError, InvalidParamsError
from detox_guard.models.default import DEFAULT_ID

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "detox_guard.detoxifiers")
    return caplog


def trained(backbone: Backbone, tmp_path: Path) -> str:
    random_detoxifier(backbone).save(tmp_path / "made")
    return registry.register(tmp_path / "made", backbone).sha256


def test_a_model_without_a_detoxifier_gets_texts(tiny_llama: Backbone, said: pytest.LogCaptureFixture) -> None:
    for asked in ("auto", None):
        said.clear()
        streams = as_streams(asked, tiny_llama)
        assert [(s.detoxifier, s.weight) for s in streams] == [(s.detoxifier, s.weight) for s in UNTRAINED]
        assert {stream.source for stream in streams} == {"untrained"}
        (line,) = said.messages
        assert tiny_llama.id in line
        assert all(stream.id in line for stream in streams)


def test_one_that_was_trained_here_comes_first(
    tiny_llama: Backbone, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    sha256 = trained(tiny_llama, tmp_path)
    (stream,) = as_streams("auto", tiny_llama)
    assert (stream.detoxifier.sha256, stream.weight, stream.source) == (sha256, -1.0, "trained here")
    (line,) = said.messages
    assert "trained here" in line
    (entry,) = registry.entries()
    registry.remove(entry.name)
    assert as_streams("auto", tiny_llama)[0].source == "untrained"


def test_one_that_is_damaged_is_passed_over(
    tiny_llama: Backbone, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    trained(tiny_llama, tmp_path)
    folder = registry.find(tiny_llama)
    assert folder is not None
    rows = torch.full((5, tiny_llama.hidden_size), torch.nan)
    save_file({"prompt_embeddings": rows}, folder / "adapter_model.safetensors")
    assert as_streams("auto", tiny_llama)[0].source == "untrained"
    passed, _ = said.messages
    assert "passed over" in passed
    assert "NaN" in passed


def test_the_shipped_one_serves_the_default_before_all_others(tiny_llama: Backbone, tmp_path: Path) -> None:
    default = dataclasses.replace(tiny_llama, id=DEFAULT_ID, hidden_size=576, num_layers=30, max_positions=8192)
    shipped = Detoxifier.load()
    for backbone in (default, dataclasses.replace(default, id="a-folder/SmolLM2-135M-Instruct")):
        (stream,) = as_streams("auto", backbone)
        assert (stream.detoxifier.sha256, stream.source) == (shipped.sha256, "shipped")


def test_a_name_that_matches_with_another_width_is_an_error_only_where_it_was_asked_for(
    tiny_llama: Backbone, said: pytest.LogCaptureFixture
) -> None:
    lookalike = dataclasses.replace(tiny_llama, id=DEFAULT_ID)
    assert as_streams("auto", lookalike)[0].source == "untrained"
    assert len([line for line in said.messages if "passed over" in line]) == 1
    with pytest.raises(DetoxifierMismatchError, match="hidden size"):
        as_streams(Detoxifier.load(), lookalike)


def test_texts_trained_ones_and_weights_go_together(tiny_llama: Backbone) -> None:
    soft, text = random_detoxifier(tiny_llama), Detoxifier.from_text("Kind words:", weight=0.5)
    streams = as_streams([soft, text, text.detoxifier], tiny_llama)
    assert streams == (SteeringStream(soft), text, SteeringStream(text.detoxifier))
    assert as_streams((), tiny_llama) == ()
    with pytest.raises(InvalidParamsError, match="from_text"):
        as_streams(3, tiny_llama)  # type: ignore[arg-type]


def test_one_line_for_ones_own_model(tiny_folder: Path) -> None:
    with DetoxiGen.from_pretrained(tiny_folder, device="cpu") as model:
        reply = model.generate("So, she is", max_new_tokens=5, seed=1)
        assert len(model.detoxifiers) == len(UNTRAINED)
        assert all("untrained" in one for one in model.detoxifiers)
        assert reply.steering.detoxifiers == model.detoxifier_ids
        assert reply.steering.alpha > 0
        assert model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=3).usage.completion_tokens <= 3


def test_the_next_start_uses_what_was_trained(tiny_folder: Path, tmp_path: Path) -> None:
    with DetoxiGen.from_pretrained(tiny_folder, device="cpu") as model:
        sha256 = trained(model.backbone, tmp_path)
    with DetoxiGen.from_pretrained(tiny_folder, device="cpu", detoxifier="auto") as model:
        assert model.detoxifier_ids == (f"-1:{sha256[:12]}",)
        assert "trained here" in model.detoxifiers[0]
