"""Tiny random models in folders, and nodes on this machine that keep to little memory and to loopback."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["ONE_NODE", "nodes", "save_tiny", "serving"]

ONE_NODE: dict[str, Any] = {
    "num_cpus": 4,
    "object_store_memory": 80_000_000,
    "include_dashboard": False,
    "node_ip_address": "127.0.0.1",
}
PORT = 18_123


def save_tiny(folder: Path, seed: int = 0) -> str:
    """A tiny Llama and its tokenizer. Texts steer it, as it has no detoxifier of its own."""
    make_tiny_model(make_tiny_config("llama", max_position_embeddings=2048), seed).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@contextmanager
def nodes(count: int = 2) -> Iterator[None]:
    """So many nodes, with a driver connected."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=ONE_NODE)
    try:
        for _ in range(count - 1):
            cluster.add_node(**{name: value for name, value in ONE_NODE.items() if name != "include_dashboard"})
        ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
        yield
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
