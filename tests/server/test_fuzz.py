"""Odd requests, made up by hypothesis: whatever comes, nothing is answered with 500."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from harness import random_detoxifier
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import client_of, listening
from tiny import make_tiny_backbone

from detox_guard import DecodingParams, DetoxiGen, SteeringStream
from detox_guard.server import ServerConfig, create_app

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters(exclude_categories=())),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "x"]), "content": TEXT | ODD},
    optional={"name": TEXT, "tool_calls": ODD, "tool_call_id": TEXT, "x": ODD},
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "parameters": ODD | st.just({})})}
)
FIELDS = {
    "n": st.integers(-1, 3) | ODD, "seed": st.integers() | ODD, "stop": TEXT | st.lists(TEXT, max_size=3) | ODD,
    "temperature": st.floats(allow_nan=False) | ODD, "top_p": st.floats(0, 1) | ODD, "top_k": ODD, "stream": ODD,
    "tools": st.lists(TOOL, max_size=2) | ODD, "tool_choice": st.sampled_from(["auto", "none", "required"]) | ODD,
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "json_schema"])}) | ODD,
    "logprobs": ODD, "chat_template_kwargs": ODD, "model": ODD, "detox": ODD | st.fixed_dictionaries({"alpha": ODD}),
}  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    streams = [SteeringStream(random_detoxifier(backbone))]
    with (
        DetoxiGen(backbone, streams, params=DecodingParams(max_new_tokens=3)) as model,
        listening(create_app(model, ServerConfig(max_tokens=8))) as url,
        client_of(url) as client,
    ):
        yield client


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    messages=st.lists(MESSAGE, max_size=3) | ODD,
    some=st.lists(st.sampled_from(sorted(FIELDS)), max_size=2, unique=True),
    odd_name=st.none() | TEXT,
    data=st.data(),
)
def test_no_chat_is_answered_with_500(
    client: httpx.Client, messages: Any, some: list[str], odd_name: str | None, data: st.DataObject
) -> None:
    body = {"messages": messages, **{name: data.draw(FIELDS[name]) for name in some}}
    if odd_name is not None:
        body[odd_name] = 1
    sent = json.dumps(body).encode()
    response = client.post("/v1/chat/completions", content=sent, headers={"content-type": "application/json"})
    assert response.status_code < 500, (sent, response.text)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(path=st.sampled_from(["/v1/completions", "/v1/moderations", "/v1/chat/completions"]), body=st.binary() | TEXT)
def test_no_bytes_are_answered_with_500(client: httpx.Client, path: str, body: bytes | str) -> None:
    sent = body if isinstance(body, bytes) else json.dumps({"prompt": body, "input": body}).encode()
    assert client.post(path, content=sent, headers={"content-type": "application/json"}).status_code < 500


def test_half_characters_are_taken_as_the_core_takes_them(client: httpx.Client) -> None:
    for body in (
        {"prompt": "a \ud800", "max_tokens": 2},
        {"prompt": "a", "\ud800": 1},
        {"prompt": "a", "model": "\udfff"},
    ):
        sent = json.dumps(body).encode()
        response = client.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
        assert response.is_client_error, response.text
