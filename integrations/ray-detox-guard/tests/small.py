"""Tiny random models in folders, and nodes on this machine that keep to little memory."""

from __future__ import annotations

import os
import secrets
import signal
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TINY", "kill", "nodes", "replicas_of", "save_tiny", "serving"]

NODE: dict[str, Any] = {"num_cpus": 3, "object_store_memory": 80_000_000}
PORT = 18_123
TINY: dict[str, Any] = {"loading": {"device": "cpu", "dtype": "float32"}, "params": {"ignore_eos": True}}
"""How a tiny model is served: replies as long as asked for, the same beside any others."""


def save_tiny(folder: Path, seed: int = 0) -> str:
    """A tiny Llama and its tokenizer. Texts steer it, as it has no detoxifier of its own. Its weights are small enough
    that the rows beside a reply do not change it in float32 (`TINY`)."""
    config = make_tiny_config("llama", max_position_embeddings=2048, initializer_range=0.1)
    make_tiny_model(config, seed).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@contextmanager
def nodes(count: int = 2) -> Iterator[str]:
    """So many nodes of three cores, with a driver connected; their address."""
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Where others use the machine, a proxy takes longer to start than Serve waits by default.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    }
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(**NODE)
        ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def serving(**tables: Any) -> Iterator[str]:
    """The address of an application with these tables of a configuration."""
    from ray import serve

    from ray_detox_guard import app

    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    try:
        serve.run(app(tables), name="detox", route_prefix="/")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.delete("detox")


def replicas_of(deployment: str) -> list[int]:
    """The processes of a deployment's replicas: Ray names a process by its actor, and by what that is at."""
    name = f"ray::ServeReplica:detox:{deployment}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if entry.read_bytes().rstrip(b"\0").split(b".")[0] == name:
                found.append(int(entry.parent.name))
    return found


def kill(processes: list[int]) -> None:
    """At once, with no chance to say so."""
    for one in processes:
        os.kill(one, signal.SIGKILL)
