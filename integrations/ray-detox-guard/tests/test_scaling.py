"""More replicas as requests queue up, and several models on shared replicas. `make test-ray` runs it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from waiting import wait_until

from asking import post
from small import TINY, replicas_of, save_tiny, serving

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_replicas_are_started_as_requests_queue_up(cluster: str, folder: str) -> None:
    more = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 0}
    grown = Event()

    def asks(url: str) -> set[int]:
        answers = set()
        while not grown.is_set():
            answers.add(post(url, max_tokens=200).status_code)
        return answers

    with serving(models={"tiny": {**TINY, "model": folder}}, ray={"replicas": more}) as url:
        assert len(replicas_of("engine-tiny")) == 1
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(asks, url) for _ in range(8)]
            try:
                wait_until(lambda: len(replicas_of("engine-tiny")) == 2, 240)
            finally:
                grown.set()
        assert {status for one in asked for status in one.result()} == {200}


def test_several_models_share_a_replica_that_holds_two(cluster: str, folder: str, tmp_path: Path) -> None:
    others = {name: save_tiny(tmp_path / name, seed) for seed, name in enumerate(("b", "c"), 1)}
    models = {name: {**TINY, "model": at} for name, at in {"a": folder, **others}.items()}

    def told(url: str) -> dict[str, Any]:
        listed = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
        return {one["id"]: one["detox"]["steered"] for one in listed}

    def said(url: str, name: str) -> str:
        answer = post(url, model=name, seed=7)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        return str(answer.json()["choices"][0]["message"]["content"])

    with serving(models=models, ray={"multiplexed": 2}) as url:
        first = {name: said(url, name) for name in models}
        assert len(set(first.values())) == 3, "one model answered for another"
        assert {name: said(url, name) for name in models} == first
        assert told(url) == dict.fromkeys(models, True)
        assert post(url, model="d").status_code == 404
        assert len(replicas_of("engines")) == 1
