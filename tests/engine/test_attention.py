"""Attention that copies no keys: the same as transformers', and only for whoever asks for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

from detox_guard.engine.torch.attention import packed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = AttentionInterface()["sdpa"]
    yield
    AttentionInterface.register("sdpa", before)


def attend(mask: Tensor | None, queries: int = 2, **how: Any) -> Tensor:
    """Two rows, six heads over two of keys, nine slots."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, queries, 8, generator=draw)
    key, value = (torch.randn(2, 2, 9, width, generator=draw) for width in (8, 4))
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    found: Tensor = AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=0.3, **how)[0]
    return found


def some_mask(queries: int = 2) -> Tensor:
    mask = torch.rand(2, 1, queries, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    return mask


def no_copy(*_: object) -> Tensor:
    raise AssertionError("keys were copied")


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_it_is_transformers_own_without_a_copy(queries: int, monkeypatch: Any) -> None:
    mask = some_mask(queries)
    exact = attend(mask, queries)
    added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    monkeypatch.setattr(sdpa_attention, "repeat_kv", no_copy)
    with packed():
        for one in (mask, added):
            found = attend(one, queries)
            assert (found.shape, found.is_contiguous()) == (exact.shape, True)
            torch.testing.assert_close(found, exact)


def test_what_it_does_not_know_is_left_to_transformers() -> None:
    bias = torch.randn(2, 6, 2, 9, generator=torch.Generator().manual_seed(2))
    asked: list[tuple[Tensor | None, dict[str, Any]]] = [
        (some_mask(), {"position_bias": bias}),  # a bias a head
        (bias, {}),  # a mask a head
        (None, {"is_causal": False}),
    ]
    exact = [attend(mask, **how) for mask, how in asked]
    with packed():
        for (mask, how), other in zip(asked, exact, strict=True):
            torch.testing.assert_close(attend(mask, **how), other, rtol=0, atol=0)


def test_only_the_thread_that_asked_has_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(sdpa_attention, "repeat_kv", no_copy)
    with packed():
        attend(some_mask())
        with ThreadPoolExecutor(1) as other, pytest.raises(AssertionError, match="copied"):
            other.submit(attend, some_mask()).result()
    with pytest.raises(AssertionError, match="copied"):
        attend(some_mask())


def test_somebody_elses_attention_stays() -> None:
    def own(*_: object, **__: object) -> tuple[Tensor, None]:
        return torch.zeros(1), None

    AttentionInterface.register("sdpa", own)
    with packed():
        assert AttentionInterface()["sdpa"] is own
