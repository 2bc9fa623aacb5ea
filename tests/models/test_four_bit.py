"""Weights on a grid of 16 values: those that are are found, and others are rounded to one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_tiny_backbone

from detox_guard.errors import BackboneError, InvalidParamsError
from detox_guard.models.four_bit import GROUP, grid_of, is_on_grid, round_to_grid
from detox_guard.models.load import load_backbone


def as_in_a_file(rows: int = 48, columns: int = 96, *, shift: float = 0.0) -> torch.Tensor:
    """`[rows, columns]` float32 as Q4_1 files have them: a scale and a least value a group, both in float16."""
    g = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (rows, columns // GROUP, GROUP), generator=g)
    q[..., 5], q[..., 17] = 0, 15  # a group's least and greatest
    scale = (torch.rand(rows, columns // GROUP, 1, generator=g) * 0.02 + 0.001).half().float()
    least = (-scale * 7.3 + shift).half().float()
    return (q * scale + least).view(rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_the_numbers_of_a_file_are_found_again(dtype: torch.dtype, shift: float) -> None:
    weight = as_in_a_file(shift=shift)
    assert is_on_grid(weight.to(dtype))
    grid = grid_of(weight.to(dtype))
    groups = weight.view(48, -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    assert torch.equal(grid.q.view_as(groups), ((groups - low) / (high - low) * 15).round().int())
    assert (grid.values() - weight).abs().max() < weight.abs().max() * 2**-7


def test_the_grid_of_a_group_of_equal_weights_is_that_weight() -> None:
    weight = torch.full((16, GROUP), 0.5)
    weight[3] = 0
    assert torch.equal(grid_of(weight).values(), weight)
    assert is_on_grid(weight)


@pytest.mark.parametrize("where", [0, 100])
def test_a_weight_with_one_number_between_the_steps_is_on_no_grid(where: int) -> None:
    weight = as_in_a_file(128)
    least, greatest = weight[where, :GROUP].aminmax()
    weight[where, 9] = least + (greatest - least) * 6.5 / 15
    assert not is_on_grid(weight)


def test_random_weights_and_odd_widths_are_on_no_grid() -> None:
    assert not is_on_grid(torch.randn(64, 96))
    assert not is_on_grid(as_in_a_file()[:, :48])


def test_rounding_puts_each_layer_but_the_head_on_a_grid() -> None:
    model = make_tiny_backbone("llama", hidden_size=96, intermediate_size=64).model.bfloat16()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert round_to_grid(model) == 21
    for name, weight in model.named_parameters():
        rounded = ".layers." in name and weight.dim() == 2
        assert is_on_grid(weight) if rounded else torch.equal(weight, before[name]), name
        # Half a step of a group's fifteen at most, and what bfloat16 rounds.
        assert (weight - before[name]).abs().max() <= before[name].abs().max() * 2 / 15 * 0.55


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapters_own_matrices_are_not_rounded() -> None:
    model = make_tiny_backbone("llama", hidden_size=96, intermediate_size=64).model
    tuned = get_peft_model(model, LoraConfig(r=32, target_modules=["q_proj"]))
    inner = tuned.get_base_model()
    own = {name: weight.clone() for name, weight in inner.named_parameters() if "lora_" in name}
    assert round_to_grid(inner) == 21
    assert own
    assert all(torch.equal(inner.get_parameter(name), weight) for name, weight in own.items())


def test_a_model_without_such_layers_cannot_be_rounded() -> None:
    with pytest.raises(BackboneError, match="gpt2: no layer"):
        round_to_grid(make_tiny_backbone("gpt2").model)


@pytest.mark.parametrize(
    ("asked", "field"), [({"dtype": "float32"}, "dtype"), ({"device_map": "auto"}, "quantization_config")]
)
def test_int4_is_for_bfloat16_on_a_cpu(asked: dict[str, str], field: str) -> None:
    """Said before the model is looked for."""
    with pytest.raises(InvalidParamsError, match=field):
        load_backbone("no/such-model", quantization_config="int4", **asked)
