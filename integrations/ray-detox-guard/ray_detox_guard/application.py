"""`app`: from a configuration to an application of Ray Serve. Knows deployments; knows no request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve

from ray_detox_guard.config import RayFile, deployment_name
from ray_detox_guard.gateway import Gateway
from ray_detox_guard.replica import make_replica

if TYPE_CHECKING:
    from collections.abc import Mapping

    from detox_guard.server import ModelConfig
    from ray.serve import Application

    from ray_detox_guard.config import ReplicaConfig

__all__ = ["app"]


def app(args: dict[str, Any]) -> Application:
    """The application: `serve run ray_detox_guard:app`, or with `config=FILE`.

    `args`: `config`, the path of a TOML or YAML file; or its tables `server`, `models` and `ray` (`RayFile`). None at
    all is the embedded default model. Each model is a deployment `engine-NAME`, so a Serve config can change it by that
    name; `engines` holds all that are multiplexed, and `gateway` speaks HTTP.
    Raises `InvalidParamsError`, `DataError`.
    """
    file = RayFile.told(args)
    if file.ray.multiplexed is not None:
        shared = _replicas("engines", file.models, file, file.ray.replicas)
        handles = dict.fromkeys(file.models, shared)
    else:
        handles = {
            name: _replicas(deployment_name(name), {name: one}, file, file.replicas_of(name))
            for name, one in file.models.items()
        }
    most = file.server.max_requests + 32  # the server refuses by itself; its refusals and probes need room
    gateway = serve.deployment(
        name="gateway", num_replicas=file.ray.gateways, max_ongoing_requests=most, ray_actor_options={"num_cpus": 0}
    )(Gateway)
    return gateway.bind(file, handles)


def _replicas(name: str, models: Mapping[str, ModelConfig], file: RayFile, how: ReplicaConfig) -> Application:
    deployment = serve.deployment(
        name=name,
        max_ongoing_requests=how.max_ongoing_requests,
        max_queued_requests=how.max_queued_requests,
        ray_actor_options={"num_cpus": how.cpus, "num_gpus": how.gpus, "resources": how.resources},
        autoscaling_config={
            "min_replicas": how.min_replicas,
            "max_replicas": how.max_replicas,
            "target_ongoing_requests": how.target_ongoing_requests,
            "upscale_delay_s": how.upscale_delay_s,
            "downscale_delay_s": how.downscale_delay_s,
        },
    )(make_replica(file.ray.multiplexed))
    return deployment.bind(dict(models), file.server.guard)
