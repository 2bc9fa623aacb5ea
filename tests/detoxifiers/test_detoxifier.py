"""The detoxifier's folder, its card, and what fits which backbone."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_backbone

from detox_guard.detoxifiers import soft_prompt as module
from detox_guard.detoxifiers.card import DataSource, DetoxifierCard
from detox_guard.detoxifiers.resolve import as_streams
from detox_guard.detoxifiers.soft_prompt import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, Detoxifier, SteeringStream
from detox_guard.errors import (
    DetoxifierError,
    DetoxifierFormatError,
    DetoxifierMismatchError,
    DetoxifierNotFoundError,
    InvalidParamsError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from detox_guard.models.backbone import Backbone

P = 5


def make_detoxifier(backbone: Backbone, *, seed: int = 0, **card: Any) -> Detoxifier:
    tensor = torch.randn(P, backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
    fields: dict[str, Any] = {
        "base_id": backbone.id,
        "hidden_size": backbone.hidden_size,
        "num_layers": backbone.num_layers,
        "virtual_tokens": P,
        "position": "reply",
    }
    return Detoxifier(tensor, DetoxifierCard(**{**fields, **card}))


def peft_model(backbone: Backbone, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return peft.get_peft_model(
            backbone.model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **config)
        )


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Backbone) -> Path:
    make_detoxifier(tiny_llama).save(tmp_path / "detox")
    return tmp_path / "detox"


# 1. The format, both ways


def test_round_trip_is_exact(tmp_path: Path, tiny_llama: Backbone) -> None:
    data = (DataSource(name="rows.jsonl", sha256="0" * 64, rows=3, licence="CC0-1.0"),)
    ours = make_detoxifier(tiny_llama, data=data, heldout_loss_after={"bare": 1.5, "mean": 1.5}, seed=3)
    ours.save(tmp_path / "a" / "b")
    again = Detoxifier.load(tmp_path / "a" / "b")
    assert torch.equal(again.embeddings, ours.embeddings)
    assert again.card == ours.card
    assert again.sha256 == ours.sha256 != make_detoxifier(tiny_llama, seed=4).sha256
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted(
        [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    )


def test_peft_loads_ours(folder: Path, tiny_llama: Backbone) -> None:
    backbone = make_tiny_backbone("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = peft.PeftModel.from_pretrained(backbone.model, folder)
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, Detoxifier.load(folder).embeddings)
    assert model.active_peft_config.base_model_name_or_path == tiny_llama.id


def test_peft_made_folder_loads_here(tmp_path: Path) -> None:
    backbone = make_tiny_backbone("llama")
    model = peft_model(backbone)
    model.save_pretrained(tmp_path)
    loaded = Detoxifier.load(str(tmp_path))
    assert torch.equal(loaded.embeddings, model.prompt_encoder["default"].embedding.weight.detach())
    assert loaded.card.position == "front"
    assert (loaded.card.virtual_tokens, loaded.card.num_layers) == (P, backbone.num_layers)
    assert loaded.card.base_id == ""
    loaded.validate(backbone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_become_float32(folder: Path, dtype: torch.dtype) -> None:
    tensor = load_file(folder / WEIGHTS_FILE)["prompt_embeddings"].to(dtype)
    save_file({"prompt_embeddings": tensor}, folder / WEIGHTS_FILE)
    loaded = Detoxifier.load(folder)
    assert loaded.embeddings.dtype == torch.float32
    assert torch.equal(loaded.embeddings, tensor.float())


def test_save_that_is_cut_off_leaves_nothing_to_load(
    folder: Path, tiny_llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = make_detoxifier(tiny_llama, seed=1)
    replace = os.replace
    for allowed in range(3):
        calls = iter(range(allowed))

        def cut_off(source: Path, target: Path, calls: Any = calls) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(module.os, "replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            new.save(folder)
        with pytest.raises(DetoxifierFormatError, match="no adapter_config"):
            Detoxifier.load(folder)
    monkeypatch.setattr(module.os, "replace", replace)
    new.save(folder)
    assert Detoxifier.load(folder).sha256 == new.sha256


# 2. Folders that are refused, each by name


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def weights(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file(tensors, folder / WEIGHTS_FILE)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / CONFIG_FILE, **changes)


def card(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / CARD_FILE, **changes)


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-8])


GOOD = torch.zeros(P, 48)
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lora": (config(peft_type="LORA"), "peft_type is 'LORA'"),
    "no type": (config(peft_type=...), "peft_type is None"),
    "task": (config(task_type="SEQ_2_SEQ_LM"), "task_type"),
    "submodules": (config(num_transformer_submodules=2), "num_transformer_submodules is 2"),
    "virtual tokens": (config(num_virtual_tokens=P + 1), "virtual_tokens"),
    "token dim": (config(token_dim=47), "hidden_size"),
    "config is no JSON": (lambda folder: (folder / CONFIG_FILE).write_text("{"), "not JSON"),
    "config is a list": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "not a JSON object"),
    "config is bytes": (lambda folder: (folder / CONFIG_FILE).write_bytes(b"\xff\xfe"), "not JSON"),
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), "no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "no adapter_model.safetensors"),
    "pickle": (only_pickle, "pickled adapter_model.bin"),
    "truncated": (truncate, "not readable as safetensors"),
    "empty": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b""), "not readable as safetensors"),
    "other key": (weights(prompts=GOOD), r"\['prompts'\]"),
    "one key more": (weights(prompt_embeddings=GOOD, more=GOOD + 1), "more"),
    "shape": (weights(prompt_embeddings=torch.zeros(P + 1, 48)), r"\(6, 48\)"),
    "axes": (weights(prompt_embeddings=torch.zeros(P * 48)), r"\(240,\)"),
    "integers": (weights(prompt_embeddings=GOOD.long()), "no floating type"),
    "NaN": (weights(prompt_embeddings=GOOD * math.nan), "NaN"),
    "infinite": (weights(prompt_embeddings=GOOD + math.inf), "infinite"),
    "card is no JSON": (lambda folder: (folder / CARD_FILE).write_text("?"), "not JSON"),
    "card: unknown field": (card(colour="red"), "colour"),
    "card: missing field": (card(base_id=...), "base_id"),
    "card: position": (card(position="middle"), "position"),
    "card: other base": (card(base_id="another"), "base_id"),
    "card: other layers": (card(num_layers=7), "num_layers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_refused(folder: Path, name: str) -> None:
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(DetoxifierFormatError, match=message):
        Detoxifier.load(folder)


def test_a_checkpoint_is_no_detoxifier(folder: Path) -> None:
    (folder / CARD_FILE).unlink()
    Detoxifier.load(folder)
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(DetoxifierFormatError, match="a checkpoint"):
        Detoxifier.load(folder)


def test_peft_folder_without_widths_is_refused(folder: Path) -> None:
    (folder / CARD_FILE).unlink()
    edit(folder / CONFIG_FILE, token_dim=None)
    with pytest.raises(DetoxifierFormatError, match="hidden_size"):
        Detoxifier.load(folder)


@pytest.mark.parametrize("source", ["/no/such/folder", "./absent", "absent", "a/b/c", "x" * 5000, "", "no good/na me"])
def test_absent_folder(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DetoxifierError):
        Detoxifier.load(source)


def test_a_path_never_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fetch", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DetoxifierNotFoundError):
        Detoxifier.load(Path("org/name"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DetoxifierFormatError, match="not a folder"):
        Detoxifier.load("file")


def test_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        asked.append((repo_id, kwargs))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert Detoxifier.load("org/name", revision="abc").sha256 == Detoxifier.load(folder).sha256
    ((repo_id, kwargs),) = asked
    assert (repo_id, kwargs["revision"]) == ("org/name", "abc")
    assert not any(pattern.endswith((".bin", "*")) for pattern in kwargs["allow_patterns"])


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DetoxifierNotFoundError, match="org/name") as caught:
        Detoxifier.load("org/name")
    assert caught.value.hint


# 3. The right backbone


def test_validate(tiny_llama: Backbone) -> None:
    ours = make_detoxifier(tiny_llama)
    ours.validate(tiny_llama)
    make_detoxifier(tiny_llama, base_id="Some-Org/" + tiny_llama.id.upper()).validate(tiny_llama)
    make_detoxifier(tiny_llama, base_id="", num_layers=None).validate(tiny_llama)
    for change, message in (
        ({"id": "org/other"}, "org/other"),
        ({"hidden_size": 64}, "hidden size: 48"),
        ({"num_layers": 2}, "number of layers: 3"),
        ({"max_positions": P}, "5 virtual tokens"),
    ):
        with pytest.raises(DetoxifierMismatchError, match=message):
            ours.validate(dataclasses.replace(tiny_llama, **change))


def test_as_streams_takes_one_or_many(folder: Path, tiny_llama: Backbone) -> None:
    ours = Detoxifier.load(folder)
    for given in (folder, str(folder), ours, SteeringStream(ours), [ours], (folder,)):
        (stream,) = as_streams(given, tiny_llama)
        assert stream.detoxifier.sha256 == ours.sha256
        assert stream.weight == -1.0
    streams = as_streams([SteeringStream(ours, 0.5), folder], tiny_llama)
    assert [stream.weight for stream in streams] == [0.5, -1.0]


def test_as_streams_refuses(folder: Path, tiny_llama: Backbone, tiny_gpt2: Backbone) -> None:
    with pytest.raises(DetoxifierError, match="empty"):
        as_streams([], tiny_llama)
    with pytest.raises(DetoxifierMismatchError):
        as_streams([folder], tiny_gpt2)


@pytest.mark.parametrize("weight", [0, 0.0, math.nan, math.inf, -math.inf, 1e308, 1e-300, 10**400, True, "1", None])
def test_weight_bounds(tiny_llama: Backbone, weight: Any) -> None:
    with pytest.raises(InvalidParamsError, match="weight"):
        SteeringStream(make_detoxifier(tiny_llama), weight)


# 4. The shipped one


def test_shipped_detoxifier(tiny_llama: Backbone) -> None:
    shipped = Detoxifier.load()
    card = shipped.card
    assert card.base_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (card.position, card.virtual_tokens, card.hidden_size, card.num_layers) == ("reply", 20, 576, 30)
    assert card.start_sha256 is not None
    assert min(card.heldout_aim.values()) > 0.7  # it favours the toxic text of a pair, in every kind of context
    assert card.heldout_aim["mean"] > 0.8
    assert card.command is not None
    assert card.command.startswith("detox-guard train ")
    assert all(source.licence in ("CC0-1.0", "Apache-2.0") for source in card.data)
    for name in (CONFIG_FILE, CARD_FILE):
        assert not any(place in (module.DEFAULT_FOLDER / name).read_text() for place in ("/work", "/tmp", "/home"))
    backbone = dataclasses.replace(tiny_llama, id=card.base_id, hidden_size=576, num_layers=30, max_positions=8192)
    (stream,) = as_streams(None, backbone)
    assert stream.detoxifier.sha256 == shipped.sha256


# 6. Folders from strangers


@pytest.mark.parametrize("name", [CONFIG_FILE, CARD_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("what", ["pipe", "device", "link", "link to nothing", "folder"])
def test_pipes_devices_and_links_are_refused_at_once(folder: Path, tmp_path: Path, name: str, what: str) -> None:
    path = folder / name
    path.rename(tmp_path / "moved")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link": tmp_path / "moved", "link to nothing": "/nowhere"}[what])
    with pytest.raises(DetoxifierFormatError, match=name):
        Detoxifier.load(folder)


def test_the_hubs_cache_may_link_into_its_own_store(folder: Path, tmp_path: Path) -> None:
    store, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--name" / "snapshots" / "abc"
    store.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate((CONFIG_FILE, CARD_FILE, WEIGHTS_FILE)):
        (folder / name).rename(store / f"blob{i}")
        (snapshot / name).symlink_to(f"../../blobs/blob{i}")
    assert Detoxifier.load(snapshot).card.virtual_tokens == P


@pytest.mark.parametrize("name", [CONFIG_FILE, CARD_FILE])
@pytest.mark.parametrize("content", ["[" * 200_000, '{"peft_type":' + "[" * 900 + "]" * 900 + "}"])
def test_deep_json_is_an_error_by_name(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(DetoxifierFormatError, match=name):
        Detoxifier.load(folder)


def test_another_adapter_is_told_where_it_belongs(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "peft_type": "LORA"}))
    with pytest.raises(DetoxifierFormatError, match="LORA") as caught:
        Detoxifier.load(folder)
    assert "as the model" in caught.value.hint


def test_numbers_that_the_backbones_dtype_cannot_hold(tiny_llama: Backbone) -> None:
    ours = make_detoxifier(tiny_llama)
    large = dataclasses.replace(ours, embeddings=torch.full_like(ours.embeddings, 1e6))
    large.validate(tiny_llama)
    half = dataclasses.replace(tiny_llama, dtype=torch.float16)
    with pytest.raises(DetoxifierMismatchError, match="float16"):
        large.validate(half)


@pytest.mark.parametrize("given", [3, object(), [3], [None], {"a": 1}])
def test_what_is_no_detoxifier_is_named(tiny_llama: Backbone, given: Any) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        as_streams(given, tiny_llama)
    assert caught.value.field == "detoxifier"
