"""Two nodes on this machine and four replicas of a tiny model, which are killed under load. `make test-ray` runs it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from waiting import wait_until

from asking import post, streamed
from small import TINY, kill, replicas_of, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
FOUR = {"min_replicas": 4, "max_replicas": 4}
START_S = 240
LONG: dict[str, Any] = {"max_tokens": 500, "detox": {"guard": False}}
"""Long enough to be under way when a replica is lost; unguarded, so that the first words come soon."""


@pytest.fixture(scope="module")
def url(cluster: str, folder: str) -> Iterator[str]:
    with serving(models={"tiny": {**TINY, "model": folder}}, ray={"replicas": FOUR, "retries": 5}) as at:
        yield at


def test_the_servers_interface_is_there_and_replicas_lie_on_both_nodes(url: str) -> None:
    import ray

    assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
    (model,) = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    assert model["id"] == "tiny"
    assert model["detox"]["steered"] is True
    whole, stream = post(url, seed=3), streamed(url, seed=3)
    assert whole.status_code == stream.status == 200, whole.text
    assert stream.text == whole.json()["choices"][0]["message"]["content"] != ""
    assert stream.events[-1] == "[DONE]"
    assert whole.json()["choices"][0]["detox"]["guard"]
    assert len(replicas_of("engine-tiny")) == 4
    left = [node["Resources"]["CPU"] for node in ray.nodes()]
    assert max(left) < 4, "one node could hold them all"


def test_openais_client_streams(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 24}
    whole = client.chat.completions.create(**asked, seed=3)
    pieces = client.chat.completions.create(**asked, seed=3, stream=True, extra_body={"detox": {"guard": False}})
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content != ""
    with pytest.raises(openai.BadRequestError, match="positions"):
        client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": "x " * 2000}]})


def test_what_a_client_sends_is_in_no_log(url: str) -> None:
    import ray

    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "quokka"}}}
    refused = post(url, messages=[{"role": "user", "content": "quokka"}], response_format=schema)
    assert refused.status_code == 400
    assert post(url, messages=[{"role": "user", "content": "quokka"}]).status_code == 200
    folder = Path("/tmp/ray", ray.get_runtime_context().get_session_name(), "logs")
    logs = [one for one in folder.rglob("*") if one.is_file()]
    assert any("engine-tiny" in one.name for one in logs)
    assert not [one.name for one in logs if b"quokka" in one.read_bytes()]


@pytest.mark.parametrize("lost", [1, 4])
def test_lost_replicas_cost_no_answer_and_no_word_of_a_stream(url: str, lost: int) -> None:
    seeds = range(8)
    expected = {seed: post(url, seed=seed, **LONG).json()["choices"][0]["message"]["content"] for seed in seeds}
    begun = Semaphore(0)
    with ThreadPoolExecutor(16) as pool:
        whole = {seed: pool.submit(post, url, seed=seed, **LONG) for seed in seeds}
        streams = {seed: pool.submit(streamed, url, begun.release, seed=seed, **LONG) for seed in seeds}
        for _ in seeds:
            assert begun.acquire(timeout=120)
        kill(replicas_of("engine-tiny")[:lost])
        assert not all(one.done() for one in streams.values()), "all were over before"
    for seed, text in expected.items():
        answer = whole[seed].result()
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == text
        stream = streams[seed].result()
        assert (stream.error, stream.reason, stream.events[-1]) == (None, "length", "[DONE]")
        assert stream.text == text
    wait_until(lambda: len(replicas_of("engine-tiny")) == 4, START_S)
