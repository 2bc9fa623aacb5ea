"""Loading a backbone: its facts, device and number type, and what cannot be steered."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from saved import causal, save
from tiny import Kind, make_tiny_backbone, make_tiny_config, make_tiny_model, make_tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    GPTNeoConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
)

from detox_guard.errors import (
    BackboneError,
    InvalidParamsError,
    NotPicklableError,
    UnsupportedBackboneError,
)
from detox_guard.models import default as embedded
from detox_guard.models.backbone import Backbone, from_model, pick_device, pick_dtype
from detox_guard.models.checks import max_positions
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from pathlib import Path

# --- what is loaded


def test_folder_loads_frozen_in_eval_mode_with_its_facts(folder: Path) -> None:
    backbone = load_backbone(folder, device="cpu", dtype="float32")
    assert backbone.id == "tiny-llama"
    assert backbone.revision == load_backbone(folder, device="cpu", dtype="bfloat16").revision
    assert backbone.revision != make_tiny_backbone("llama", seed=1).revision  # another model of that name
    assert (backbone.device, backbone.dtype) == (torch.device("cpu"), torch.float32)
    assert (backbone.hidden_size, backbone.num_layers, backbone.vocab_size) == (48, 3, 480)
    assert (backbone.max_positions, backbone.learned_positions, backbone.window) == (512, False, None)
    assert (backbone.eos_token_ids, backbone.pad_token_id, backbone.has_chat_template) == ((2,), 3, True)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    ids = torch.tensor([[5, 6, 7]])
    expected = make_tiny_model(make_tiny_config("llama")).eval()(ids).logits
    torch.testing.assert_close(backbone.model(ids).logits, expected)


def test_string_path_and_trailing_slash_name_the_same_folder(folder: Path) -> None:
    assert load_backbone(f"{folder}/", dtype="float32").id == "tiny-llama"


def test_dtype_is_honoured(folder: Path) -> None:
    backbone = load_backbone(str(folder), dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in backbone.model.parameters())


def test_loaded_model_is_wrapped_in_place_and_moved_only_when_asked() -> None:
    model = make_tiny_model(make_tiny_config("llama"))
    backbone = load_backbone(model, tokenizer=make_tiny_tokenizer())
    assert backbone.model is model
    assert (backbone.id, backbone.dtype) == ("llama", torch.float32)
    assert load_backbone(model, tokenizer=make_tiny_tokenizer(), dtype="bfloat16").dtype == torch.bfloat16


def test_tokenizer_may_be_a_folder(folder: Path) -> None:
    model = make_tiny_model(make_tiny_config("llama"))
    assert load_backbone(model, tokenizer=folder).pad_token_id == 3


def test_loaded_model_needs_its_tokenizer() -> None:
    with pytest.raises(InvalidParamsError, match="tokenizer"):
        load_backbone(make_tiny_model(make_tiny_config("llama")))


@pytest.mark.parametrize("model", [7, object(), torch.nn.Linear(2, 2)])
def test_not_a_model(model: Any) -> None:
    with pytest.raises(InvalidParamsError, match="model"):
        load_backbone(model, tokenizer=make_tiny_tokenizer(), dtype="float32")


@pytest.mark.parametrize(
    ("kind", "learned", "limit", "window", "pad"),
    [("gpt2", True, 256, None, 3), ("gpt2-no-pad", True, 256, None, 2), ("mistral", False, 512, 16, 3)],
)
def test_positions_windows_and_padding(kind: Kind, learned: bool, limit: int, window: int | None, pad: int) -> None:
    backbone = make_tiny_backbone(kind)
    assert (backbone.learned_positions, backbone.max_positions) == (learned, limit)
    assert (backbone.window, backbone.pad_token_id) == (window, pad)
    assert len(backbone.tokenizer) == 480, "nothing is added to the vocabulary"


def test_opt_and_gpt_neo_are_recognised() -> None:
    small = {"vocab_size": 480, "hidden_size": 32, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
    opt = from_model(
        causal(
            OPTConfig(
                **small,
                word_embed_proj_dim=16,
                ffn_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
        ),
        make_tiny_tokenizer(),
    )
    assert (opt.learned_positions, opt.max_positions) == (True, 64)
    assert opt.hidden_size == 16, "the width of an input embedding, not of the layers"
    neo = from_model(
        causal(
            GPTNeoConfig(
                **small,
                num_layers=2,
                num_heads=2,
                attention_types=[[["global", "local"], 1]],
                window_size=8,
                max_position_embeddings=64,
            )
        ),
        make_tiny_tokenizer(),
    )
    assert (neo.learned_positions, neo.window, neo.num_layers) == (True, 8, 2)


def test_end_tokens_come_from_all_sources_once_in_order() -> None:
    model = make_tiny_model(make_tiny_config("llama", eos_token_id=[7, 2]))
    model.generation_config.eos_token_id = [9, 7]
    assert from_model(model, make_tiny_tokenizer()).eos_token_ids == (9, 7, 2)


def test_no_pad_and_no_end_token_pads_with_zero() -> None:
    model = make_tiny_model(make_tiny_config("llama", eos_token_id=None, pad_token_id=None))
    tokenizer = make_tiny_tokenizer(pad=False)
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    backbone = from_model(model, tokenizer)
    assert (backbone.eos_token_ids, backbone.pad_token_id, backbone.has_chat_template) == ((), 0, False)


# --- the embedded default


def test_default_backbone(default_backbone: Backbone) -> None:
    assert (default_backbone.id, default_backbone.revision) == (embedded.DEFAULT_ID, embedded.DEFAULT_REVISION)
    assert (default_backbone.hidden_size, default_backbone.num_layers, default_backbone.vocab_size) == (576, 30, 49152)
    assert (default_backbone.max_positions, default_backbone.window) == (8192, None)
    assert default_backbone.eos_token_ids == (2, 0)
    assert default_backbone.has_chat_template
    tokenizer = default_backbone.tokenizer
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = default_backbone.model.generate(ids, do_sample=False, max_new_tokens=2, pad_token_id=2)
    assert "Paris" in tokenizer.decode(out[0])
    assert tokenizer("<|im_start|>").input_ids == [1]


@pytest.mark.parametrize("field", ["gguf_file", "revision"])
def test_default_takes_neither_a_file_nor_a_revision(field: str) -> None:
    with pytest.raises(InvalidParamsError, match=field):
        load_backbone(**{field: "x.gguf"})


def test_hub_snapshot_as_default_carries_its_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = folder.rename(folder.parent / "0123abc")
    monkeypatch.setattr(embedded, "default_backbone_dir", lambda: commit)
    backbone = load_backbone(dtype="float32")
    assert (backbone.id, backbone.revision) == (embedded.DEFAULT_ID, "0123abc")


# --- device and dtype


def test_device_is_cuda_if_there_is_one_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(None) == torch.device("cuda")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", 3.5, "meta"])
def test_bad_device(device: Any) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        pick_device(device)
    assert caught.value.field == "device"
    assert caught.value.value == device


def test_absent_device_says_so_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InvalidParamsError, match="0 cuda devices") as caught:
        pick_device("cuda")
    assert 'device="cpu"' in caught.value.hint
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(InvalidParamsError, match="1 cuda devices"):
        pick_device("cuda:1")


def test_cpu_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert pick_dtype(None, cpu) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert pick_dtype("auto", cpu) == torch.float32
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert pick_dtype(None, cpu) == torch.float32


def test_cuda_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert pick_dtype(None, torch.device("cuda")) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float32", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "half", "", torch.int8, 16])
def test_bad_dtype(dtype: Any) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        pick_dtype(dtype, torch.device("cpu"))
    assert caught.value.field == "dtype"


def test_longrope_is_served_up_to_the_length_of_its_training() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    known = {**rope, "original_max_position_embeddings": 64, "factor": 8.0}
    assert make_tiny_backbone("llama", rope_parameters=known).max_positions == 64
    assert make_tiny_backbone("llama").max_positions == 512
    config = make_tiny_config("llama", rope_parameters=known)
    config.rope_parameters = rope
    with pytest.raises(UnsupportedBackboneError, match="longrope"):
        max_positions(config, "tiny")


# --- what cannot be steered


def refused(path: Path, model: PreTrainedModel, reason: str) -> None:
    with pytest.raises(UnsupportedBackboneError, match=reason):
        load_backbone(save(path, model), dtype="float32")


def test_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=480, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    refused(tmp_path, AutoModel.from_config(config), "cannot be steered: it is an encoder-decoder|no causal language")
    config = AutoConfig.for_model(
        "bart", vocab_size=480, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    refused(tmp_path, AutoModel.from_config(config), "it is an encoder-decoder")


@pytest.mark.parametrize(
    ("kind", "extra", "reason"),
    [
        ("doge", {}, "a later one changes what an earlier one sees"),
        ("reformer", {}, "at random"),
        ("xlnet", {}, "both directions"),
        ("vit", {}, "no causal language model"),
        ("whisper", {}, "encoder-decoder"),
    ],
)
def test_refused_by_config_before_any_weight_is_read(
    tmp_path: Path, kind: str, extra: dict[str, Any], reason: str
) -> None:
    AutoConfig.for_model(kind, **extra).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackboneError, match=reason):
        load_backbone(tmp_path)


def test_bidirectional_encoder(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=480, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    refused(tmp_path, causal(config), "not causal|no key/value cache")


def test_attention_that_takes_no_mask_of_ours() -> None:
    """flex_attention would not refuse the engine's masks: it would read past them."""
    model = causal(make_tiny_config("llama"))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedBackboneError, match="flex_attention"):
        from_model(model, make_tiny_tokenizer())


def test_headless_model() -> None:
    with pytest.raises(UnsupportedBackboneError, match="no language-model head"):
        from_model(AutoModel.from_config(make_tiny_config("llama")), make_tiny_tokenizer())


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    model = make_tiny_model(make_tiny_config("llama"))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BackboneError, match="not finite") as caught:
        load_backbone(save(tmp_path, model), dtype="float32")
    assert "float32" in caught.value.hint


def test_vocabulary_of_config_and_head_differ() -> None:
    model = make_tiny_model(make_tiny_config("llama"))
    model.config.vocab_size = 500
    with pytest.raises(BackboneError, match="480 logits for a vocabulary of 500"):
        from_model(model, make_tiny_tokenizer())


def test_tokenizer_of_another_model() -> None:
    model = make_tiny_model(make_tiny_config("llama", vocab_size=100))
    with pytest.raises(BackboneError, match="wrong tokenizer"):
        from_model(model, make_tiny_tokenizer())


def test_weights_left_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = causal(make_tiny_config("llama"))
    with pytest.raises(BackboneError, match="meta"):
        from_model(model, make_tiny_tokenizer())


def test_a_backbone_is_shared_by_copies_and_not_pickled(tiny_llama: Backbone) -> None:
    assert copy.deepcopy({"b": tiny_llama})["b"] is tiny_llama
    with pytest.raises(NotPicklableError, match="belong to their process"):
        pickle.dumps(tiny_llama)
