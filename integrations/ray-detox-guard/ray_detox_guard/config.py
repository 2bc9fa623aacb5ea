"""What may be said of an application on Ray: a server's file, and a table `[ray]`. Knows settings; starts nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping  # noqa: TC003  (pydantic reads annotations when it runs)
from typing import Annotated, Any, Self

from detox_guard import InvalidParamsError, LoadOptions, StrictModel
from detox_guard.server import ServerFile
from pydantic import Field, ValidationError

__all__ = ["RayConfig", "RayFile", "ReplicaConfig"]

Count = Annotated[int, Field(ge=1, le=100_000)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


class ReplicaConfig(StrictModel):
    """Replicas of a model: what each takes, and how many there are. Raises `InvalidParamsError`."""

    min_replicas: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Fewest replicas. 0 lets a model that nobody asks leave the cluster."""
    max_replicas: Count = 1
    """Most replicas."""
    target_ongoing_requests: Annotated[float, Field(gt=0, le=100_000)] = 16.0
    """Requests a replica, decoded and queued together, above which another replica is started."""
    upscale_delay_s: Seconds = 30.0
    """How long there are too many requests before another replica is started."""
    downscale_delay_s: Seconds = 600.0
    """How long there are too few before one is ended."""
    max_ongoing_requests: Count = 64
    """Requests that one replica decodes at once. The others wait before it."""
    max_queued_requests: Annotated[int, Field(ge=-1, le=1_000_000)] = 256
    """Requests that wait in one gateway. The next one is refused with 429. -1 is no bound."""
    cpus: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    """CPU cores a replica. Ray gives arithmetic as many threads."""
    gpus: Annotated[float, Field(ge=0, le=1_000)] = 0.0
    """GPUs a replica. More than one needs a `device_map` in the model's `loading`."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Ray's own resources a replica, such as `{"accelerator_type:H100": 0.001}`."""


class RayConfig(StrictModel):
    """How an application lies on a cluster. Raises `InvalidParamsError`."""

    gateways: Count = 1
    """Replicas that speak HTTP. They hold keys and bounds, and no model."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3
    """How often a request is given to another replica after its own was lost."""
    multiplexed: Annotated[int, Field(ge=1, le=64)] | None = None
    """All models share the replicas, and each replica holds so many of them, the latest used. None: each model has
    replicas of its own."""
    replicas: ReplicaConfig = ReplicaConfig()
    """Replicas of every model that `models` does not name."""
    models: dict[str, ReplicaConfig] = Field(default_factory=dict)
    """Replicas of single models, by their names."""


class RayFile(ServerFile):
    """A server's configuration file with a table `[ray]`."""

    ray: RayConfig = RayConfig()
    """The cluster's part."""

    @classmethod
    def told(cls, args: Mapping[str, Any]) -> Self:
        """From what Serve hands over: `config` is a file; else the file's own tables. Raises `InvalidParamsError`,
        `DataError`.
        """
        tables = dict(args)
        if (path := tables.pop("config", None)) is not None:
            if tables:
                raise InvalidParamsError("config", path, f"alone, or not at all: {', '.join(tables)} is given too")
            file = cls.read(path)
        else:
            try:
                file = cls.model_validate_json(json.dumps(tables))
            except ValidationError as error:
                raise InvalidParamsError.from_pydantic(error) from None
        file.check()
        return file

    def check(self) -> None:
        """What no field can tell by itself. Raises `InvalidParamsError`."""
        for name in self.ray.models:
            if name not in self.models:
                raise InvalidParamsError(f"ray.models.{name}", name, f"one of the models: {', '.join(self.models)}")
        if self.ray.multiplexed is not None and self.ray.models:
            raise InvalidParamsError(
                "ray.models", list(self.ray.models), "empty, as multiplexed models share their replicas"
            )
        names = [deployment_name(name) for name in self.models]
        for name in names:
            if names.count(name) > 1:
                raise InvalidParamsError(
                    "models", list(self.models), f"names that differ in letters and digits: {name}"
                )
        for name, one in self.models.items():
            if one.upstream is not None:
                raise InvalidParamsError(
                    f"models.{name}.upstream",
                    one.upstream,
                    "not on Ray, which brings the models itself",
                    hint="`detox-guard serve --upstream` guards another endpoint",
                )
            gpus = self.replicas_of(name).gpus
            if gpus > 1 and not LoadOptions(**one.loading).spreads:
                raise InvalidParamsError(
                    f"models.{name}.loading.device_map",
                    one.loading.get("device_map"),
                    f'"auto" or a mapping, as a replica has {gpus:g} GPUs',
                )

    def replicas_of(self, name: str) -> ReplicaConfig:
        """Those of one model."""
        return self.ray.models.get(name, self.ray.replicas)


def deployment_name(model: str) -> str:
    """What Serve calls the deployment of a model."""
    return f"engine-{re.sub(r'[^A-Za-z0-9]+', '-', model)}"
