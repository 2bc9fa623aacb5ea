"""The engine's own decoding step, and the rows that it takes: held against whole passes of transformers' forward."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from detox_benchmarks.registry.check import TOLERANCE, largest_error
from detox_benchmarks.registry.shapes import tiny_config, tiny_model, tiny_tokenizer
from tiny import make_tiny_backbone, make_tiny_config, make_tiny_model
from transformers import DynamicCache

from detox_guard.engine.torch import static
from detox_guard.engine.torch.held import Held
from detox_guard.engine.torch.lanes import Lanes
from detox_guard.engine.torch.static import StaticStep, static_step
from detox_guard.models.backbone import from_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

FULL: dict[str, Any] = {"sliding_window": None, "layer_types": ["full_attention"] * 4}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 6}),
    ("qwen2", FULL),
    ("qwen3", FULL),
    ("qwen3", {}),  # every other layer has a window
    ("phi3", {"sliding_window": None}),
    (
        "phi3",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0], **FULL}),
    ("olmo2", {}),
    ("olmo3", {}),
    ("ministral", {}),
    ("gemma3_text", {}),
    ("gemma", {}),
    (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def step_of(model: PreTrainedModel) -> StaticStep:
    step = static_step(model)
    assert step is not None
    return step


def filled(
    model: PreTrainedModel, prompts: list[list[int]], record: Callable[..., Any] | None = None, **bounds: int
) -> Lanes:
    """Rows that hold these prompts."""
    room = {"max_rows": 8, "max_slots": 4096, **bounds}
    rows = Lanes(step_of(model), model.device, record=record, **room)
    for prompt in prompts:
        join(rows, model, prompt)
    return rows


def join(rows: Lanes, model: PreTrainedModel, prompt: list[int]) -> None:
    cache = DynamicCache()
    model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
    rows.join([Held([(layer.keys, layer.values) for layer in cache.layers])], 1)


def whole(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The logits `[tokens, vocab]` of one pass without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def same(logits: Tensor, exact: Tensor) -> bool:
    return bool((logits.softmax(-1) - exact.softmax(-1)).abs().max() <= 1e-5)


@pytest.mark.parametrize(("kind", "fields"), FAMILIES)
def test_each_family_is_taken_and_each_row_is_that_of_a_whole_pass(kind: str, fields: dict[str, Any]) -> None:
    backbone = from_model(tiny_model(tiny_config(kind, **fields)), tiny_tokenizer(), id=f"tiny-{kind}")
    assert backbone.running.layout == "padded"
    assert static_step(backbone.model) is not None
    assert largest_error(backbone) <= TOLERANCE / 10


def test_several_tokens_a_row_are_as_one_after_another() -> None:
    model = make_tiny_backbone("llama", initializer_range=0.2).model
    prompts, tokens = [[5, 6, 7, 8, 9, 10, 11], [40, 41]], [[20, 21, 22], [30, 31, 32]]
    rows = filled(model, prompts)
    at_once = rows.decode(tokens)
    assert at_once.shape == (2, 3, model.config.vocab_size)
    for row, prompt, fed in zip(rows.rows, prompts, tokens, strict=True):
        assert same(at_once[row.index], whole(model, prompt + fed)[-3:])
        rows.rewind(row, 3)
        assert row.length == len(prompt)
    for i in range(3):
        assert same(rows.decode([[fed[i]] for fed in tokens])[:, 0], at_once[:, i])


def test_what_is_no_number_stays_with_its_own_row() -> None:
    """A row that leaves, and a token that is taken back, leave nothing behind that a shorter row could see."""
    model = make_tiny_backbone("llama", initializer_range=0.2).model
    rows = filled(model, [[5] * 20, [9, 8, 7], list(range(5, 35))])
    broken = rows.save(rows.rows[:1])
    rows.remove(rows.rows[0])
    for held in (broken[0], broken[0].context):
        assert held is not None
        for buffers in held.layers:
            for one in buffers:
                one.fill_(torch.nan)
    rows.join(broken, 1)
    assert rows.decode([[3], [3], [3]])[2].isnan().all()
    rows.rewind(rows.rows[0], 1)
    rows.rewind(rows.rows[1], 1)
    rows.remove(rows.rows[0])  # the broken one takes its place
    rows.remove(rows.rows[0])
    join(rows, model, [9, 8, 7])
    for row, prompt in ((rows.rows[0], [9, 8, 7]), (rows.rows[1], [9, 8, 7])):
        assert row.length == len(prompt)
    logits = rows.decode([[4], [4]])
    assert same(logits[0], whole(model, [9, 8, 7, 4])[-1:])
    assert same(logits[1], whole(model, [9, 8, 7, 4])[-1:])


def test_bfloat16_is_as_near_as_rounding_allows() -> None:
    model = make_tiny_backbone("llama", initializer_range=0.1).model.to(torch.bfloat16)
    prompts = [list(range(5, 45)), list(range(60, 70))]
    logits = filled(model, prompts).decode([[100], [101]])[:, 0]
    exact = torch.stack([whole(model, [*prompt, 100 + i])[-1] for i, prompt in enumerate(prompts)])
    p, q = exact.log_softmax(-1), logits.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).max() <= 5e-3


def _hooked(model: Any) -> None:
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)


def _changed(model: Any) -> None:
    layer = model.model.layers[0]
    layer.forward = layer.forward


def _other_part(model: Any) -> None:
    model.model.layers[2].self_attn.more = torch.nn.Identity()


def _other_mlp(model: Any) -> None:
    model.model.layers[2].mlp = torch.nn.Identity()


def _other_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm = torch.nn.LayerNorm(48)


@pytest.mark.parametrize("change", [_hooked, _changed, _other_part, _other_mlp, _other_norm])
def test_what_is_not_known_is_left_to_transformers(change: Callable[[Any], None], caplog: Any) -> None:
    model = make_tiny_model(make_tiny_config("llama"))
    assert static_step(model) is not None
    change(model)
    with caplog.at_level(logging.WARNING):
        assert static_step(model) is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt2", {}),
        ("stablelm", {}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_other_models_are_left_to_transformers(kind: str, fields: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(kind, **fields))
    assert static_step(model) is None
    assert largest_error(from_model(model, tiny_tokenizer(), id=kind)) <= TOLERANCE


@pytest.mark.parametrize("window", [4, 64, 300])
@pytest.mark.parametrize("wrong", ["no window", "longer by one", "shorter by one", "every layer"])
def test_a_step_that_sees_another_window_is_not_taken(window: int, wrong: str, monkeypatch: Any, caplog: Any) -> None:
    model = tiny_model(tiny_config("qwen3", sliding_window=window))
    assert static_step(model) is not None
    right = static.windows_of(model.config)
    told = {
        "no window": (),
        "longer by one": [(kind, seen and seen + 1) for kind, seen in right],
        "shorter by one": [(kind, seen and seen - 1) for kind, seen in right],
        "every layer": [(kind, window) for kind, _ in right],
    }[wrong]
    monkeypatch.setattr(static, "windows_of", lambda _: told)
    with caplog.at_level(logging.WARNING):
        assert static_step(model) is None
    assert "something else" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "why"), [("residual_multiplier", 1.001, "something else"), ("head_dim", 24, "failed")]
)
def test_a_step_that_is_wrong_is_not_taken(field: str, value: float, why: str, caplog: Any) -> None:
    """The model does not look at what its config says; the step does."""
    backbone = make_tiny_backbone("llama")
    setattr(backbone.model.config, field, value)
    with caplog.at_level(logging.WARNING):
        assert largest_error(backbone) <= TOLERANCE
    (record,) = caplog.records
    assert why in record.getMessage()


class Recorder:
    """Records steps as a GPU does: what is replayed reads what lies where it lay, and gives its result in one place."""

    def __init__(self, error: float = 0.0) -> None:
        self.recorded = self.replayed = 0
        self._error = error

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        out = run()

        def replay() -> Tensor:
            self.replayed += 1
            return out.copy_(run() * (1 + self._error))

        return replay


def test_recorded_steps_give_what_plain_ones_do() -> None:
    """Joins, leaves, rewinds, spare rows; and a batch that outgrows what was recorded."""
    model = make_tiny_backbone("llama", initializer_range=0.2).model
    recorder = Recorder()
    rows = filled(model, [], recorder, max_rows=4)
    read: list[list[int]] = []

    def joins(prompt: list[int]) -> None:
        join(rows, model, prompt)
        read.append(list(prompt))

    def steps(count: int) -> None:
        for i in range(count):
            tokens = [(i * 7 + j * 13) % 400 + 4 for j in range(len(read))]
            logits = rows.decode([[token] for token in tokens])[:, 0]
            for j, token in enumerate(tokens):
                read[j].append(token)
            if i % 4 == 0:
                assert same(logits, torch.stack([whole(model, ids)[-1] for ids in read]))

    joins([5, 6, 7])
    steps(9)
    joins(list(range(50, 90)))
    joins([9] * 3)
    steps(9)
    rows.rewind(rows.rows[1], 6)
    del read[1][-6:]
    steps(5)
    rows.remove(rows.rows[0])
    read[0] = read.pop()
    steps(5)
    assert recorder.recorded <= 3
    assert recorder.replayed >= 26
    joins(list(range(4, 264)))
    steps(5)
    while rows.rows:
        rows.remove(rows.rows[0])
    read.clear()
    joins([77, 78])
    steps(5)


@pytest.mark.parametrize("kind", ["wrong", "impossible"])
def test_without_recordings_that_are_right_each_step_is_run(kind: str, caplog: Any) -> None:
    model = make_tiny_backbone("llama", initializer_range=0.2).model

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if kind == "impossible":
            raise RuntimeError("no such thing can be recorded")
        return Recorder(error=0.01)(run)

    prompt = [5, 6, 7, 8]
    with caplog.at_level(logging.WARNING):
        rows = filled(model, [prompt], record)
        for token in (20, 30, 40):
            prompt = [*prompt, token]
            assert same(rows.decode([[token]])[0], whole(model, prompt)[-1:])
    assert len(caplog.records) == 1
