"""`DetoxiGen` as its users hold it: whole, streamed, batched, async, cancelled, given nonsense."""

from __future__ import annotations

import asyncio
import gc
import json
from itertools import pairwise
from typing import Any

import pytest
from harness import random_detoxifier
from tiny import make_tiny_backbone
from waiting import await_until, wait_until

from detox_guard import (
    DecodingParams,
    DetoxiGen,
    EngineClosedError,
    EngineConfig,
    EngineError,
    InvalidParamsError,
    PromptError,
    PromptTooLongError,
    SteeringStream,
)

PROMPTS = ["Hello there", "So, I'm starting to think", "今天天气", "x", "I ❤️ this 😀"]


def test_stream_generate_batch_and_async_agree(model: DetoxiGen) -> None:
    async def everything() -> tuple[list[str], list[str], list[str]]:
        whole = await asyncio.gather(*(model.agenerate(prompt) for prompt in PROMPTS))
        streamed = ["".join([chunk.text async for chunk in model.astream(prompt)]) for prompt in PROMPTS]
        batch = await model.abatch(PROMPTS)
        return [r.text for r in whole], streamed, [r.text for r in batch]

    expected = [model.generate(prompt).text for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert ["".join(chunk.text for chunk in model.stream(prompt)) for prompt in PROMPTS] == expected
    assert [r.text for r in model.batch(PROMPTS)] == expected
    assert asyncio.run(everything()) == (expected, expected, expected)


def test_the_last_chunk_carries_the_generation(model: DetoxiGen) -> None:
    chunks = list(model.stream("Hello there", seed=None))
    assert all(chunk.generation is None and chunk.text for chunk in chunks[:-1])
    last = chunks[-1].generation
    assert last is not None
    assert last.finish_reason == chunks[-1].finish_reason
    assert last.text == "".join(str(chunk) for chunk in chunks)
    assert last.usage.prompt_tokens == model.count_tokens("Hello there")
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert model.generate("Hello there", seed=last.seed).text == last.text


def test_stop_strings_end_the_reply_and_are_not_in_it(model: DetoxiGen) -> None:
    plain = model.generate("Hello there", ignore_eos=True)
    for size in (1, 3, 7):
        at = plain.text.index(plain.text[8 : 8 + size])
        stop = plain.text[at : at + size]
        chunks = list(model.stream("Hello there", ignore_eos=True, stop=["never to be seen", stop]))
        r = chunks[-1].generation
        assert r is not None
        assert r.text == plain.text[: plain.text.index(stop)] == "".join(chunk.text for chunk in chunks)
        assert r.finish_reason == "stop"
        assert r.usage.completion_tokens < plain.usage.completion_tokens
        assert r.trace is not None
        assert "".join(token.text for token in r.trace.tokens) == r.text


def test_stop_token_ids_and_ignore_eos(model: DetoxiGen) -> None:
    r = model.generate("Hello there", ignore_eos=True)
    assert r.finish_reason == "length"
    assert r.usage.completion_tokens == 30
    assert r.trace is not None
    third = r.trace.tokens[2].token_id
    stopped = model.generate("Hello there", ignore_eos=True, stop_token_ids=[third])
    assert stopped.finish_reason == "stop"
    assert stopped.usage.completion_tokens <= 2


def test_the_trace_tells_what_steering_did(model: DetoxiGen) -> None:
    r = model.generate("Hello there", ignore_eos=True)
    trace = r.trace
    assert trace is not None
    assert len(trace) == r.usage.completion_tokens == 30
    assert "".join(token.text for token in trace.tokens) == r.text
    for token in trace.tokens:
        assert 0 < token.p_after <= 1
        assert 0 < token.p_before <= token.preferred_p <= 1
        assert token.kl_detoxifier > 0
        assert token.kl_steering >= 0
        assert token.replaced == (token.preferred_id != token.token_id)
    assert any(token.replaced for token in trace.tokens)
    assert trace.mean_kl_steering > 0.01
    assert json.loads(json.dumps(trace.to_dict()))["tokens"][0]["token_id"] == trace.tokens[0].token_id
    assert model.generate("Hello there", trace=False).trace is None
    plain = model.generate("Hello there", alpha=0.0).trace
    assert plain is not None
    assert all(token.p_before == pytest.approx(token.p_after) and token.kl_steering < 1e-6 for token in plain.tokens)
    assert plain.mean_kl_detoxifier == 0


def test_the_trace_page_is_self_contained_and_escapes(model: DetoxiGen) -> None:
    trace = model.generate("Hello there").trace
    assert trace is not None
    page = trace.to_html(title="<b>&", prompt="<script>alert(1)</script>")
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert "http" not in page
    assert "&lt;script&gt;" in page
    assert page.count("class=tip") == len(trace)


def test_defaults_overrides_and_foreign_params(model: DetoxiGen) -> None:
    assert model.generate("x").usage.completion_tokens <= 30
    assert model.generate("x", DecodingParams(max_new_tokens=2, seed=1)).usage.completion_tokens <= 2
    with pytest.raises(InvalidParamsError, match="alhpa"):
        model.generate("x", alhpa=1.0)
    with pytest.raises(InvalidParamsError, match="params"):
        model.generate("x", {"alpha": 1.0})  # type: ignore[arg-type]


def test_closing_or_dropping_a_stream_frees_its_seat(model: DetoxiGen) -> None:
    for how in ("close", "break", "drop"):
        stream = model.stream("Hello there", max_new_tokens=400, ignore_eos=True)
        next(stream)
        assert model.stats().seats == 1
        if how == "close":
            stream.close()
        elif how == "break":
            for _ in stream:
                break
            del stream
        else:
            del stream
        gc.collect()
        wait_until(lambda: model.stats().seats == 0)
    assert model.stats().cancelled == 3
    unstarted = model.stream("Hello there")
    assert model.stats().submitted == 3
    unstarted.close()


async def test_cancelling_a_task_frees_the_seat(model: DetoxiGen) -> None:
    task = asyncio.create_task(model.agenerate("Hello there", max_new_tokens=400, ignore_eos=True))
    await await_until(lambda: model.stats().seats)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream = model.astream("Hello there", max_new_tokens=400, ignore_eos=True)
    await anext(stream)
    await stream.aclose()
    await await_until(lambda: not model.stats().seats)
    assert model.stats().cancelled == 2


async def test_two_streams_at_once_interleave(model: DetoxiGen) -> None:
    order: list[int] = []

    async def follow(i: int) -> None:
        async for chunk in model.astream(PROMPTS[i], ignore_eos=True, max_new_tokens=60):
            if chunk.text:
                order.append(i)

    await asyncio.gather(follow(0), follow(1))
    assert sum(a != b for a, b in pairwise(order)) > 10


async def test_the_event_loop_runs_on_between_tokens(model: DetoxiGen) -> None:
    """A loop that were blocked while a token is decoded would tick at most once a chunk."""
    ticks = chunks = 0
    done = asyncio.Event()

    async def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(tick())
    async for _ in model.astream("Hello there", ignore_eos=True, max_new_tokens=100):
        chunks += 1
    done.set()
    await ticker
    assert ticks > 5 * chunks


def test_after_close_everything_is_refused_by_name() -> None:
    backbone = make_tiny_backbone("llama")
    model = DetoxiGen(backbone, [SteeringStream(random_detoxifier(backbone))])
    model.close()
    model.close()
    with pytest.raises(EngineClosedError):
        model.generate("x")


def test_without_a_detoxifier_only_alpha_zero_is_served() -> None:
    model = DetoxiGen(make_tiny_backbone("gpt2"))
    assert model.params.alpha == 0
    assert model.generate("x", max_new_tokens=3, ignore_eos=True).usage.completion_tokens == 3
    with pytest.raises(EngineError, match="no detoxifier"):
        model.generate("x", alpha=1.0)


BAD_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -0.1}, "alpha"), ({"alpha": float("nan")}, "alpha"), ({"alpha": float("inf")}, "alpha"),
    ({"alpha": "2"}, "alpha"), ({"alpha": True}, "alpha"), ({"alpha": None}, "alpha"), ({"alpha": 1e9}, "alpha"),
    ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
    ({"top_p": float("nan")}, "top_p"), ({"top_k": -1}, "top_k"), ({"top_k": 2.5}, "top_k"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"repetition_penalty": float("inf")}, "repetition_penalty"),
    ({"plausibility": 1.0}, "plausibility"), ({"plausibility": -0.5}, "plausibility"), ({"rule": "magic"}, "rule"),
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": 10**9}, "max_new_tokens"),
    ({"max_new_tokens": 1.5}, "max_new_tokens"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"), ({"stop": [""]}, "stop"), ({"stop": [3]}, "stop"), ({"stop": ["x"] * 65}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"unknown_field": 1}, "unknown_field"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "field"), BAD_PARAMS)
def test_bad_params_name_field_value_and_bound(model: DetoxiGen, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        model.generate("Hello", **changes)
    error = caught.value
    assert error.field.split(".")[0] == field
    assert error.bound
    assert field in str(error)
    assert model.generate("x", max_new_tokens=2).text is not None


@pytest.mark.parametrize(
    "prompt", ["", None, 7, b"x", [], ["x"], [{"role": "user"}], "\ud800", [{"role": "user", "content": 1}]]
)
def test_bad_prompts_are_refused_and_the_next_is_served(model: DetoxiGen, prompt: Any) -> None:
    with pytest.raises(PromptError):
        model.generate(prompt)
    with pytest.raises(PromptError):
        model.stream(prompt)  # at the call, not at the first token
    with pytest.raises(PromptError):
        asyncio.run(model.agenerate(prompt))
    assert model.generate("x", max_new_tokens=2).text is not None


def test_an_over_long_prompt_names_the_bound(model: DetoxiGen) -> None:
    limit = model.backbone.max_positions
    assert limit is not None
    with pytest.raises(PromptTooLongError, match=f"at most {limit} positions"):
        model.generate("word " * (limit + 10))
    with pytest.raises(PromptTooLongError, match="new tokens"):
        model.generate("x", max_new_tokens=limit)
    assert model.generate("x", max_new_tokens=2).text is not None


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"max_rows": 1}, "max_rows"), ({"max_queue": 0}, "max_queue"), ({"prefill_chunk": 1}, "prefill_chunk"),
     ({"max_slots": 3}, "max_slots"), ({"pack_weights": "yes"}, "pack_weights"), ({"nope": 1}, "nope")],
)  # fmt: skip
def test_bad_engine_configs(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        EngineConfig(**changes)
    assert caught.value.field == field
