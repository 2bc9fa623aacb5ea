"""A batch job of ten thousand rows on two nodes: a worker is killed, then the whole job, and the same call goes on.

`make test-ray` runs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from waiting import wait_until

from small import kill

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
ROWS = 10_000
START_S = 240
"""A driver and its workers start within this time, even where others use the machine."""


@pytest.fixture(scope="module")
def source(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts in 20 files."""
    import ray

    rows = [{"id": i, "prompt": f"The mayor {i}"} for i in range(ROWS)]
    at = tmp_path_factory.mktemp("rows") / "in"
    ray.data.from_items(rows, override_num_blocks=20).write_parquet(str(at))
    return at


def start(address: str, model: str, source: Path, output: Path) -> subprocess.Popen[bytes]:
    """A driver of its own that runs the job."""
    job = [sys.executable, str(Path(__file__).parent / "job_driver.py"), address, model, str(source), str(output)]
    path = os.pathsep.join([one for one in sys.path if one])
    return subprocess.Popen(job, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)


def workers() -> list[int]:
    """The processes that decode."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"DetoxiGenPredictor" in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def remembered(seen: Path) -> list[Path]:
    """Files of rows that are done. Others are written before the rows are."""
    return [file for file in seen.glob("*.parquet") if ".pending" not in file.name]


def test_every_row_comes_once_whoever_is_killed(cluster: str, folder: str, source: Path, tmp_path: Path) -> None:
    output, seen = tmp_path / "out", tmp_path / "out-seen"
    first = start(cluster, folder, source, output)
    wait_until(lambda: workers() and remembered(seen), START_S)
    kill(workers()[:1])
    have = len(remembered(seen))
    wait_until(lambda: len(remembered(seen)) > have, START_S)
    assert first.poll() is None, "it was over before it could be killed"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    wait_until(lambda: not workers())
    before = [i for file in remembered(seen) for i in pq.read_table(file)["id"].to_pylist()]
    assert 0 < len(before) < ROWS
    again = start(cluster, folder, source, output)
    assert again.wait(600) == 0
    rows = pq.read_table(output)
    assert sorted(rows["id"].to_pylist()) == list(range(ROWS))
    assert set(rows["error"].to_pylist()) == {""}
    assert set(rows["completion_tokens"].to_pylist()) == {4}
