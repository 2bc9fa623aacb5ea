"""One guard a process for the same arguments."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard import BackboneNotFoundError, Detoxifier, DetoxiGen, EngineConfig, EngineError, InvalidParamsError
from detox_guard.detoxifiers.card import DetoxifierCard

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    model, detoxifier = tmp_path / "tiny-shared", tmp_path / "detoxifier"
    make_tiny_model(make_tiny_config("llama")).save_pretrained(model)
    make_tiny_tokenizer().save_pretrained(model)
    card = DetoxifierCard(base_id="tiny-shared", hidden_size=48, virtual_tokens=4)
    Detoxifier(torch.zeros(4, 48), card).save(detoxifier)
    return model, detoxifier


def test_all_who_ask_get_one_guard_loaded_once(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, detoxifier = folders
    loads: list[Any] = []
    load = DetoxiGen.from_pretrained

    def counted(*args: Any, **kwargs: Any) -> DetoxiGen:
        loads.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(DetoxiGen, "from_pretrained", counted)
    got: list[DetoxiGen] = []
    threads = [
        threading.Thread(target=lambda: got.append(DetoxiGen.shared(str(model), detoxifier=detoxifier)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len({id(one) for one in got}) == 1
    # Another spelling of the same is the same; other arguments are another guard.
    assert DetoxiGen.shared(f"{model}/", detoxifier=f"{detoxifier}/", device="cpu") is got[0]
    assert DetoxiGen.shared(model, detoxifier=detoxifier, device="cpu:0", config=EngineConfig()) is got[0]
    other = DetoxiGen.shared(model, detoxifier=detoxifier, dtype="float64")
    plain = DetoxiGen.shared(model, detoxifier=())
    assert len({id(got[0]), id(other), id(plain)}) == 3
    with pytest.raises(EngineError, match="no detoxifier"):
        plain.generate("x", alpha=2.0)
    for one in (got[0], other, plain):
        one.close()
    again = DetoxiGen.shared(model, detoxifier=detoxifier)
    assert again is not got[0]
    assert again.generate("x", max_new_tokens=2, ignore_eos=True).usage.completion_tokens == 2
    again.close()


def test_ways_of_loading_are_told_apart(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = folders
    wanted: list[dict[str, Any]] = [
        {},
        {"dtype": "auto"},
        {"device_map": {"": "disk"}, "offload_folder": tmp_path},
        {"attn_implementation": "eager"},
        {"model_kwargs": {"max_position_embeddings": 64}},
    ]
    made = [DetoxiGen.shared(model, detoxifier=(), **way) for way in wanted]
    assert len({id(one) for one in made}) == len(made)
    same: list[dict[str, Any]] = [
        {"device_map": "cpu"},
        {"torch_dtype": "auto"},
        {"device_map": {"": "disk"}, "offload_folder": f"{tmp_path}/"},
        {"model_kwargs": {"attn_implementation": "eager"}},
        {"model_kwargs": {"max_position_embeddings": 64}},
    ]
    assert [DetoxiGen.shared(model, detoxifier=(), **way) for way in same] == made
    with pytest.raises(InvalidParamsError, match="model_kwargs"):
        DetoxiGen.shared(model, detoxifier=(), model_kwargs={"generation_config": object()})
    for one in made:
        one.close()


def test_what_failed_is_not_remembered(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, detoxifier = folders
    for _ in range(2):
        with pytest.raises(BackboneNotFoundError):
            DetoxiGen.shared(tmp_path / "later", detoxifier=detoxifier)
    model.rename(tmp_path / "later")
    with pytest.raises(InvalidParamsError, match="detoxifier"):
        DetoxiGen.shared(tmp_path / "later", detoxifier=3)  # type: ignore[arg-type]


def test_identity_names_no_path(folders: tuple[Path, Path]) -> None:
    model, detoxifier = folders
    with DetoxiGen.from_pretrained(model, detoxifier=str(detoxifier)) as model:
        assert model.model_id == "tiny-shared"
        assert model.detoxifier_ids[0].startswith("-1:")
        assert model.context_window == 512 - 4
        assert model.encode("Hello") == model.backbone.tokenizer("Hello", add_special_tokens=False)["input_ids"]
        assert "/" not in str(model.generate("x", max_new_tokens=1).summary())
