"""Linear layers in the layouts that decode fastest: what they compute, and which are left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from harness import decode, random_prompts, random_streams, torch_engine
from tiny import make_tiny_backbone
from torch import nn

from detox_guard.engine.torch.int4 import Int4Linear, has_kernel
from detox_guard.engine.torch.packing import PackedLinear, can_pack, pack_linears
from detox_guard.models.four_bit import round_to_grid
from detox_guard.models.load import load_backbone
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

packs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 in oneDNN here")
four_bits = pytest.mark.skipif(not has_kernel(), reason="no 4-bit kernel for this CPU")


def layers(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


def rounded(*, bias: bool = True) -> nn.Module:
    """A few layers on 4-bit grids, and one that is on none."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(64, 96, bias=bias), nn.Linear(96, 48), nn.Linear(48, 20)).bfloat16()
    model.requires_grad_(False)
    model.get_output_embeddings = lambda: model[2]  # type: ignore[method-assign, assignment]
    assert round_to_grid(model) == 2  # type: ignore[arg-type]
    return model


@packs_bf16
@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_a_packed_layer_in_bfloat16_is_the_layer(rows: int) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 30, bias=False)).bfloat16().requires_grad_(False)
    x = torch.randn(rows, 3, 64).bfloat16()
    expected, weights = model(x), [layer.weight.clone() for layer in model]  # type: ignore[union-attr, operator]
    assert can_pack(model)
    assert pack_linears(model) == 2
    assert layers(model, PackedLinear) == ["0", "1"]
    torch.testing.assert_close(model(x), expected, atol=0.02, rtol=0.02)
    assert all(torch.equal(layer.weight, was) for layer, was in zip(model, weights, strict=True))


@packs_bf16
@four_bits
@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_layers_of_4_bit_numbers_compute_the_same_in_4_bits(rows: int, smallest: bool) -> None:
    model, x = rounded(), torch.randn(rows, 64).bfloat16()
    expected = model(x)
    assert pack_linears(model, smallest=smallest) == 3
    assert layers(model, Int4Linear) == ["0", "1"]
    torch.testing.assert_close(model(x), expected, atol=0.03, rtol=0.03)
    # Many rows go through packed bfloat16, where it was kept.
    assert len(layers(model, PackedLinear)) == (1 if smallest else 3)


@packs_bf16
@four_bits
def test_the_weight_of_a_layer_in_4_bits_can_be_looked_at() -> None:
    model = rounded(bias=False)
    first = model[0].weight.clone()  # type: ignore[index]
    pack_linears(model)
    torch.testing.assert_close(model[0].weight, first, atol=2e-3, rtol=0.02)  # type: ignore[index]


def test_float32_is_never_held_in_4_bits() -> None:
    model = rounded().float()
    assert pack_linears(model) == 3
    assert layers(model, PackedLinear) == ["0", "1", "2"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_number_types_are_not_packed(dtype: torch.dtype) -> None:
    assert not can_pack(nn.Sequential(nn.Linear(64, 64, dtype=dtype)))


def test_what_accelerate_moves_is_not_packed() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model._hf_hook = object()  # type: ignore[assignment]
    assert not can_pack(model)


@packs_bf16
@four_bits
def test_the_default_model_decodes_in_4_bits_and_its_head_does_not() -> None:
    backbone = load_backbone(None, dtype="bfloat16")
    steered(backbone)
    four = layers(backbone.model, Int4Linear)
    assert len(four) == 210
    assert all(".layers." in name for name in four)
    assert type(backbone.model.lm_head) is PackedLinear


@packs_bf16
@four_bits
def test_int4_is_asked_for_by_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model")
    tiny = make_tiny_backbone("llama", hidden_size=96, intermediate_size=64)
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    plain, int4 = load_backbone(folder, dtype="bfloat16"), load_backbone(folder, quantization_config="int4")
    assert (int4.dtype, int4.identity["quantization"]) == (torch.bfloat16, "int4-g32")
    assert int4.revision != plain.revision
    steered(plain)
    steered(int4)
    assert not layers(plain.model, Int4Linear)
    assert len(layers(int4.model, Int4Linear)) == 21
    assert layers(int4.model, PackedLinear) == ["lm_head"]


def steered(backbone: Backbone) -> list[int]:
    """An engine packs the layers as it starts; this one also decodes."""
    engine = torch_engine(backbone, random_streams(backbone, "r", scale=0.1))
    prompt = random_prompts(backbone, 1, shortest=12)
    ids = decode(engine, prompt, DecodingParams(temperature=0.0, max_new_tokens=3))[0].ids
    engine.close()
    assert len(ids) == 3
    return ids
