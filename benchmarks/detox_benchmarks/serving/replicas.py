"""One replica of a tiny model on Ray against two, each held to one core: tokens a second.

Knows Ray, clocks and cores; knows no quality. Needs the package ray-detox-guard.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import ray
from ray import serve
from ray_detox_guard import app

from detox_benchmarks.speed.random_models import random_backbone

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["run_replicas"]

_PORT = 18_200


def run_replicas(*, seconds: float = 20.0, clients: int = 8, tokens: int = 1024) -> dict[str, Any]:
    """Tokens a second of one replica and of two, their ratio, and the CPU time of everything else (clients, gateway,
    Ray) against that of the replicas; JSON-able. On two cores that share bounds the ratio: 2 / (1 + share).

    Each count is measured for `seconds`. So many `clients` a replica ask for `tokens` again and again.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory() as folder:
        backbone = random_backbone("tiny", device="cpu", dtype="float32")
        backbone.model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        with _node():
            serve.start(http_options={"host": "127.0.0.1", "port": _PORT})
            told = {count: _rate(folder, count, seconds, clients * count, tokens) for count in (1, 2)}
    return {
        "tokens_per_s": {count: rate for count, (rate, _) in told.items()},
        "ratio": told[2][0] / told[1][0],
        "cpu_beside_replicas": {count: share for count, (_, share) in told.items()},
    }


@contextmanager
def _node() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=80_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def _rate(folder: str, count: int, seconds: float, clients: int, tokens: int) -> tuple[float, float]:
    """Tokens a second of `count` replicas, and the share of CPU beside them."""
    tiny = {
        "model": folder,
        "detoxifier": [],
        "loading": {"device": "cpu", "dtype": "float32"},
        "params": {"ignore_eos": True},
    }
    replicas = {"min_replicas": count, "max_replicas": count, "cpus": 1}
    server = {"guard": False, "playground": False}
    serve.run(app({"server": server, "models": {"tiny": tiny}, "ray": {"replicas": replicas}}), name="bench")
    try:
        found = _hold_to_one_core(count)
        before = _cpu_s(found)
        rate = asyncio.run(_ask(seconds, clients, tokens))
        inside, whole = (after - begun for after, begun in zip(_cpu_s(found), before, strict=True))
        return rate, (whole - inside) / inside
    finally:
        serve.delete("bench")


async def _ask(seconds: float, clients: int, tokens: int) -> float:
    """Tokens a second, counted once every client was answered for the first time."""
    counted = 0
    warm, over = asyncio.Barrier(clients + 1), asyncio.Event()
    body = {"prompt": "w3 w4 w5", "max_tokens": tokens}

    limits, url = httpx.Limits(max_connections=None), f"http://127.0.0.1:{_PORT}"
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as client:

        async def one() -> int:
            answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        async def asks() -> None:
            nonlocal counted
            await one()
            await warm.wait()
            while not over.is_set():
                came = await one()
                if not over.is_set():
                    counted += came

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(asks())
            await warm.wait()
            began = time.perf_counter()
            await asyncio.sleep(seconds)
            over.set()
            took = time.perf_counter() - began
    return counted / took


def _cpu_s(replicas: list[int]) -> tuple[float, float]:
    """Seconds of CPU so far: of the replicas, and of them with this process and all that it started."""

    def spent(process: psutil.Process) -> float:
        try:
            return float(sum(process.cpu_times()[:2]))
        except psutil.Error:
            return 0.0

    own = psutil.Process()
    return sum(spent(psutil.Process(one)) for one in replicas), sum(map(spent, [own, *own.children(recursive=True)]))


def _hold_to_one_core(count: int) -> list[int]:
    """Every thread of a replica on a core of its own; their ids. Ray gives its arithmetic one thread already."""
    found = [one for one in Path("/proc").glob("[0-9]*") if _is_replica(one)]
    assert len(found) == count, f"{len(found)} replicas where {count} were started"
    for core, process in enumerate(found):
        for thread in (process / "task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
    return [int(process.name) for process in found]


def _is_replica(process: Path) -> bool:
    try:
        name = (process / "cmdline").read_bytes().rstrip(b"\0").decode("utf-8", "replace")
    except OSError:
        return False
    return name.split(".")[0] == "ray::ServeReplica:bench:engine-tiny"
