"""Rows that share a context, whatever they do: held against whole passes of transformers' forward."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from detox_benchmarks.registry.shapes import tiny_config, tiny_model, tiny_tokenizer
from kits import TorchKit
from tiny import make_tiny_backbone
from transformers import DynamicCache

from detox_guard.detoxifiers.base import TokenPrefix, lanes_of
from detox_guard.engine import PromptIds
from detox_guard.engine.torch.forward_step import ForwardStep
from detox_guard.engine.torch.held import Held
from detox_guard.engine.torch.lanes import Lanes
from detox_guard.engine.torch.prefill import Forward
from detox_guard.engine.torch.static import static_step
from detox_guard.models.backbone import from_model
from detox_guard.settings import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from detox_guard.engine.runner import Row
    from detox_guard.models.backbone import Backbone


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


ALTERNATING = {
    "sliding_window": 5,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SHAPES: dict[str, Any] = {
    "static": ("llama",),
    "static, windows": ("qwen3", ALTERNATING),
    "recorded": ("llama",),
    "recorded, windows": ("mistral", {"sliding_window": 5}),
    "forward": ("llama",),
    "forward, windows": ("gemma2", {"sliding_window": 5}),
    "gpt2": ("gpt2",),
}
"""How a step is made, and of what model."""


def _recorded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    out = run()
    return lambda: out.copy_(run())


def _made(how: str) -> tuple[Backbone, Lanes]:
    shape, *fields = SHAPES[how]
    backbone = from_model(tiny_model(tiny_config(shape, **dict(*fields))), tiny_tokenizer(), id=f"tiny-{shape}")
    own = how.startswith(("static", "recorded"))
    step = static_step(backbone.model) if own else ForwardStep(Forward(backbone, []))
    assert step is not None
    return backbone, Lanes(step, backbone.device, 16, 8192, _recorded if how.startswith("recorded") else None)


def _layers(model: Any, ids: list[int], first: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the ids from `first` on."""
    cache = DynamicCache()
    model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return [(layer.keys[:, :, first:], layer.values[:, :, first:]) for layer in cache.layers]


def _request(model: Any, context: list[int], behind: list[list[int]]) -> list[Held]:
    """A generator's row and views behind its context."""
    root = Held(_layers(model, context, 0))
    return [root, *(Held(_layers(model, context + own, len(context)), root, root.slots) for own in behind)]


@pytest.mark.parametrize("how", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_of_whole_passes_whatever_they_do(how: str, seed: int) -> None:
    """Requests with none, one and two views join, step, are rewound, step aside, come back and leave."""
    backbone, lanes = _made(how)
    draw, vocab = random.Random(seed), backbone.vocab_size
    inside: list[tuple[list[Row], list[list[int]]]] = []

    def ids(count: int) -> list[int]:
        return [draw.randrange(4, vocab) for _ in range(count)]

    def joins() -> None:
        context, behind = ids(draw.randint(1, 30)), [ids(draw.randint(1, 9)) for _ in range(draw.randint(0, 2))]
        rows = lanes.join(_request(backbone.model, context, behind), draw.choice([1, 20]))
        inside.append((rows, [context, *([*context, *own] for own in behind)]))

    def rewinds() -> None:
        rows, read = draw.choice(inside)
        for row, one in zip(rows, read, strict=True):
            back = draw.randrange(min(len(one), 12))
            lanes.rewind(row, back)
            del one[len(one) - back :]

    def comes_back() -> None:
        rows, read = inside.pop(draw.randrange(len(inside)))
        held = lanes.save(rows)
        for row in rows:
            lanes.remove(row)
        inside.append((lanes.join(held, draw.choice([1, 20])), read))

    def leaves() -> None:
        rows, _ = inside.pop(draw.randrange(len(inside)))
        for row in draw.sample(rows, len(rows)):
            lanes.remove(row)

    def loses_a_row() -> None:
        rows, read = draw.choice(inside)
        if len(rows) > 1:
            lanes.remove(rows.pop(0))
            read.pop(0)

    for turn in range(40):
        acts = [rewinds, comes_back, leaves, loses_a_row] if inside else []
        draw.choice([joins if len(inside) < 4 else rewinds, *acts])()
        if not inside:
            continue
        count = draw.randint(1, 3)
        tokens = [ids(count) for _ in lanes.rows]
        logits = lanes.decode(tokens)
        for rows, read in inside:
            for row, one in zip(rows, read, strict=True):
                one += tokens[row.index]
                assert row.length == len(one)
                exact = backbone.model(input_ids=torch.tensor([one]), use_cache=False).logits[0, -count:].float()
                off = (logits[row.index].softmax(-1) - exact.softmax(-1)).abs().max()
                assert off <= 1e-5, (turn, float(off))


def test_a_context_that_is_shared_is_held_once() -> None:
    """A view behind a context of 300 tokens costs its own tokens, in the batch, in what is kept, and put aside."""
    kit = TorchKit()
    runner = kit.runner("rf", EngineConfig(max_rows=8, max_cached_slots=2000))
    prompt = PromptIds(tuple(range(4, 304)), True)
    prefill = runner.begin([prompt])
    assert prefill.advance(1000, lambda: False)
    (computed,) = prefill.finish()
    generator, behind, front = computed.rows
    assert (generator.slots, front.slots) == (300, 300 + len(kit.reference("rf").streams[1]))
    assert behind.slots == len(kit.reference("rf").streams[0]) < 20
    rows = runner.join(computed.rows, 300)
    for token in range(5):
        runner.decode([[10 + token]] * 3)
    for row in rows:
        runner.rewind(row, 2)
    held = runner.save(rows)
    contexts = {one.context for one in held if one.context is not None}
    assert sorted(one.slots for one in contexts) == [300, front.slots]
    assert [one.slots for one in held] == [3, behind.slots + 3, 3]


def test_a_reply_that_steps_aside_and_is_rewound_takes_no_more_than_was_counted() -> None:
    backbone, lanes = _made("static")
    rows = lanes.join(_request(backbone.model, list(range(5, 35)), [[7, 8, 9]]), 20)
    (most,) = lanes_of((TokenPrefix((7, 8, 9), place="reply"),), 30, (), 20)
    for _ in range(3):
        while rows[0].length < 30 + 20:
            lanes.decode([[3], [3]])
        assert lanes.longest == most
        held = lanes.save(rows)
        for row in rows:
            lanes.remove(row)
        rows = lanes.join(held, 20)
        for row in rows:
            lanes.rewind(row, 19)


def test_a_reply_that_may_become_longer_than_its_context_has_a_lane_a_row() -> None:
    """All lanes are as wide as the widest: a long reply would make those of the others wide."""
    backbone, lanes = _made("static")
    lanes.join(_request(backbone.model, list(range(5, 15)), [[7, 8, 9]]), 20)
    for _ in range(20):
        lanes.decode([[3], [3]])
    assert lanes.longest == max(lanes_of((TokenPrefix((7, 8, 9), place="reply"),), 10, (), 20)) == 33
    assert lanes.capacity[0] >= 2


@pytest.mark.parametrize("how", ["static", "recorded", "forward"])
def test_what_is_no_number_stays_in_its_lane_and_goes_with_its_token(how: str) -> None:
    """Also where lanes have tokens that are nobody's, because another has more rows."""
    backbone, lanes = _made(how)
    backbone.model.get_input_embeddings().weight[[0, 400]] = torch.nan  # 0 is what nobody feeds
    first = list(range(5, 25))
    lanes.join(_request(backbone.model, first, [[7, 8, 9]]), 1)
    (row,) = lanes.join(_request(backbone.model, list(range(30, 40)), []), 1)
    tokens = [[3], [3], [3]]
    assert lanes.decode(tokens).isfinite().all()
    tokens[row.index] = [400]
    logits = lanes.decode(tokens)
    assert [bool(one.isnan().any()) for one in logits] == [False, False, True]
    lanes.rewind(row, 1)
    for _ in range(3):
        assert lanes.decode([[3]] * 3).isfinite().all()


def test_only_what_somebody_is_fed_decides_about_recordings() -> None:
    """A recorded step is rounded up to lanes that are nobody's, where one that left may have kept what is no number."""
    replays = []

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        out = run()

        def replay() -> Tensor:
            replays.append(out.copy_(run()))
            out[3:] += 1.0
            return out

        return replay

    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    step = static_step(backbone.model)
    assert step is not None
    lanes = Lanes(step, backbone.device, 16, 8192, record)
    first, _, _, last = (lanes.join(_request(backbone.model, list(range(5, 15 + i)), []), 1)[0] for i in range(4))
    backbone.model.get_input_embeddings().weight[400] = torch.nan
    assert lanes.decode([[3], [3], [3], [400]])[3].isnan().all()
    lanes.remove(first)  # the last lane takes its place
    lanes.remove(last)
    lanes.join(_request(backbone.model, [40, 41, 42], []), 1)
    for _ in range(3):
        assert lanes.decode([[3]] * 3).isfinite().all()
    assert len(replays) == 3
    assert all(one.isfinite().all() for one in replays)


def test_memory_is_counted_by_what_is_shared() -> None:
    reply, front, system = (
        TokenPrefix((1,) * 10, place="reply", tail=7),
        TokenPrefix((1,) * 5, place="front"),
        TokenPrefix((), place="system"),
    )
    assert lanes_of((), 100, (), 20) == [120]
    assert lanes_of((reply,), 100, (), 20) == [100 + 17 + 2 * 20]
    assert lanes_of((reply,), 3, (), 3) == [3 + 13 + 2 * 3]
    assert lanes_of((reply,), 3, (), 20) == [23, 36]
    assert lanes_of((front, reply, reply), 100, (), 20) == [100 + 2 * 17 + 3 * 20, 125]
    assert lanes_of((front, system), 100, (130,), 20) == [120, 125, 150]
    # Two requests whose rows did not fit if each held the whole prompt.
    kit = TorchKit()
    runner = kit.runner("r", EngineConfig())
    room = runner.room(PromptIds(tuple(range(4, 304)), True), 16)
    assert room.lanes == 1
    assert room.slots < 300 + 40 + 2 * 16
