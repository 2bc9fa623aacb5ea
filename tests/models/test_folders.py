"""Folders and files that hold no model, half of one, or another thing: each is refused by name, with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard.errors import (
    BackboneError,
    BackboneNotFoundError,
)
from detox_guard.models.load import load_backbone


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder-here", "a/b/c", "nowhere.gguf"])
def test_missing_path(name: str) -> None:
    with pytest.raises(BackboneNotFoundError, match="no such file or folder"):
        load_backbone(name)


def test_missing_path_object() -> None:
    with pytest.raises(BackboneNotFoundError, match="no such file or folder"):
        load_backbone(Path("nowhere"))


def test_unknown_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneNotFoundError, match="no-such-org/no-such-model") as caught:
        load_backbone("no-such-org/no-such-model")
    assert "HF_HUB_OFFLINE" in caught.value.hint
    assert isinstance(caught.value.__cause__, OSError)


def test_impossible_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneNotFoundError):
        load_backbone("not a hub id!")


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "notes.gguf"
    file.write_bytes(b"hello")
    with pytest.raises(BackboneError, match=r"notes\.gguf: not a GGUF file"):
        load_backbone(file)


def write_tiny_gguf(file: Path) -> None:
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(480)
    bpe = json.loads(make_tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (480, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (16, 32) for name in ("attn_k", "attn_v")}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_loads_and_can_be_saved(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    backbone = load_backbone(tmp_path / "tiny.gguf", dtype="float32")
    assert (backbone.id, backbone.vocab_size, backbone.max_positions) == ("tiny.gguf", 480, 64)
    assert backbone.eos_token_ids == (2,)
    assert load_backbone(tmp_path, gguf_file="tiny.gguf", dtype="float32").id == "tiny.gguf"
    backbone.model.save_pretrained(tmp_path / "saved")
    backbone.tokenizer.save_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    saved = load_backbone(tmp_path / "saved", dtype="float32")
    torch.testing.assert_close(saved.model(ids).logits, backbone.model(ids).logits)


def test_truncated_gguf(tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(BackboneError, match=r"cut\.gguf: cannot be loaded"):
        load_backbone(file)


def test_gguf_name_inside_a_folder_that_lacks_it(folder: Path) -> None:
    with pytest.raises(BackboneNotFoundError, match=r"absent\.gguf"):
        load_backbone(folder, gguf_file="absent.gguf")


def test_empty_folder_and_adapter_folder(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no config\.json"):
        load_backbone(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError) as caught:
        load_backbone(tmp_path)
    assert "adapter" in caught.value.hint


@pytest.mark.parametrize("text", ["{", '{"model_type": "zork"}', "[]"])
def test_unreadable_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BackboneError, match="tiny-llama: cannot be loaded"):
        load_backbone(folder)


def test_config_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError) as caught:
        load_backbone(folder)
    assert "safetensors" in caught.value.hint


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(make_tiny_model(make_tiny_config("llama")).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(BackboneError) as caught:
        load_backbone(folder)
    assert "pickled" in caught.value.hint


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_weights(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"garbage" * 99, "empty": b""}[damage])
    with pytest.raises(BackboneError, match="cannot be loaded") as caught:
        load_backbone(folder)
    assert caught.value.__cause__ is not None


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="1 weights are missing"):
        load_backbone(folder)


def test_weights_that_config_leaves_out_are_not_dropped(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    others = {"another_head.weight": torch.zeros(2), "model.layers.1.self_attn.bias": torch.ones(1, 1, 4, 4)}
    save_file({**weights, **others}, folder / "model.safetensors", {"format": "pt"})
    assert load_backbone(folder).id == "tiny-llama"  # parts that the architecture does not have
    bias = {"model.layers.1.self_attn.q_proj.bias": torch.ones(48)}
    save_file({**weights, **bias}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="1 weights have no place"):
        load_backbone(folder)


def test_an_adapter_beside_a_model_is_not_served_unseen(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="a model and a PEFT adapter"):
        load_backbone(folder)


def test_missing_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BackboneError):
        load_backbone(folder)


def test_remote_code_is_refused_unless_asked_for(folder: Path) -> None:
    config = folder / "config.json"
    own_code = '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}'
    config.write_text(own_code)
    (folder / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(BackboneError) as caught:
        load_backbone(folder)
    assert "trust_remote_code=True" in caught.value.hint


def test_a_soft_prompt_in_a_folder_is_sent_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(BackboneError) as caught:
        load_backbone(tmp_path)
    assert "pass it as the detoxifier" in caught.value.hint


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_a_models_folder_is_refused_at_once(folder: Path, name: str) -> None:
    import os

    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BackboneError, match=name):
        load_backbone(folder)
