"""Two nodes on this machine: replicas and workers that are killed under load. `make test-ray` runs it."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from small import nodes, save_tiny, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 160}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with nodes(2):
        yield


@pytest.fixture(scope="module")
def url(cluster: None, folder: str) -> Iterator[str]:
    replicas = {"min_replicas": 2, "max_replicas": 2}
    with serving(models={"tiny": {"model": folder, "loading": {"device": "cpu"}}}, ray={"replicas": replicas}) as at:
        yield at


def post(url: str, **changes: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={**BODY, **changes}, timeout=300, trust_env=False)


def events(response: httpx.Response) -> list[Any]:
    told = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in told]


def said(response: httpx.Response) -> str:
    choices = [choice for one in events(response)[:-1] for choice in one.get("choices", ())]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def replica_processes() -> list[int]:
    """Processes of the engines' replicas: Ray names a process by its actor."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if entry.read_bytes().startswith(b"ray::ServeReplica:detox:engine-tiny"):
                found.append(int(entry.parent.name))
    return found


def test_the_servers_interface_is_there(url: str) -> None:
    assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
    (model,) = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    assert model["id"] == "tiny"
    assert model["detox"]["steered"] is True
    whole, streamed = post(url, seed=3), post(url, seed=3, stream=True)
    assert whole.status_code == streamed.status_code == 200, whole.text
    assert said(streamed) == whole.json()["choices"][0]["message"]["content"]
    assert events(streamed)[-1] == "[DONE]"
    assert whole.json()["choices"][0]["detox"]["guard"]
    refused = post(url, max_tokens=0)
    assert refused.status_code == 400


def test_a_killed_replica_costs_no_answer_and_cuts_no_stream(url: str) -> None:
    expected = {seed: post(url, seed=seed).json()["choices"][0]["message"]["content"] for seed in range(4)}
    with ThreadPoolExecutor(8) as pool:
        asked = [(seed, stream, pool.submit(post, url, seed=seed, stream=stream))
                 for _ in range(3) for seed in expected for stream in (False, True)]  # fmt: skip
        asked[0][2].result()
        os.kill(replica_processes()[0], signal.SIGKILL)
        answers = [(seed, stream, future.result()) for seed, stream, future in asked]
    for seed, stream, answer in answers:
        assert answer.status_code == 200, answer.text
        if not stream:
            assert answer.json()["choices"][0]["message"]["content"] == expected[seed]
            continue
        *told, last = events(answer)
        assert last == "[DONE]", "a stream was cut"
        failed = [one for one in told if "error" in one]
        assert said(answer) == expected[seed] or failed[0]["error"]["code"] == "unavailable"


def test_a_batch_job_with_a_killed_worker_and_a_second_run_has_every_row_once(
    cluster: None, folder: str, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq
    import ray
    from detox_guard import DecodingParams

    from ray_detox_guard import run_job

    count = 400
    rows = [{"id": i, "prompt": f"The mayor {i}"} for i in range(count)]
    source = tmp_path / "in"
    ray.data.from_items(rows, override_num_blocks=8).write_parquet(str(source))
    killed = tmp_path / "killed"

    class Mortal:
        """Kills its own worker, once."""

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            if 123 in batch["id"] and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return batch

    def job(output: Path, most: int, *, mortal: bool) -> dict[int, str]:
        def read() -> Any:
            some = ray.data.read_parquet(str(source)).filter(lambda row: row["id"] < most)
            return some.map_batches(Mortal, concurrency=1) if mortal else some

        run_job(
            read, str(output), id_column="id", checkpoint=str(output) + "-seen", workers=1, batch_size=32, model=folder,
            params=DecodingParams(max_new_tokens=4), loading={"device": "cpu"},
        )  # fmt: skip
        table = pq.read_table(output)
        assert len(set(table["id"].to_pylist())) == table.num_rows, "a row was written twice"
        return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))

    first = job(tmp_path / "out", 200, mortal=True)
    assert killed.exists()
    assert sorted(first) == list(range(200))
    resumed = job(tmp_path / "out", count, mortal=False)
    assert sorted(resumed) == list(range(count))
    assert resumed.items() >= first.items()
    assert job(tmp_path / "again", count, mortal=False) == resumed
