"""What may be said of an application on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from detox_guard import InvalidParamsError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from ray_detox_guard import RayFile, app

HERE = Path(__file__).parent.parent
TWO: dict[str, Any] = {"models": {"a": {"model": "x/a"}, "b": {"model": "x/b"}}}


def test_nothing_at_all_is_the_default_model_on_one_replica() -> None:
    file = RayFile.told({})
    assert list(file.models) == ["default"]
    assert file.models["default"].model is None
    assert file.replicas_of("default").max_replicas == 1
    assert file.server.guard is not None
    assert isinstance(app({}), Application)


def test_the_example_file_is_one_that_is_taken() -> None:
    file = RayFile.told({"config": str(HERE / "serve.toml")})
    assert file.ray.replicas.max_replicas > file.ray.replicas.min_replicas


def test_the_manifest_has_fields_that_kuberay_and_serve_know() -> None:
    """The fields of RayService and RayCluster are those of KubeRay's API reference (ray.io/v1)."""
    manifest = yaml.safe_load((HERE / "kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert set(manifest["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = manifest["spec"]["rayClusterConfig"]
    assert set(cluster) <= {
        "rayVersion", "enableInTreeAutoscaling", "authOptions", "headGroupSpec", "workerGroupSpecs",
    }  # fmt: skip
    group = {"rayStartParams", "template"}
    assert set(cluster["headGroupSpec"]) == group
    for one in cluster["workerGroupSpecs"]:
        assert set(one) == group | {"groupName", "replicas", "minReplicas", "maxReplicas"}
        assert one["minReplicas"] <= one["replicas"] <= one["maxReplicas"]
    for one in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in one["rayStartParams"].values())
        (container,) = one["template"]["spec"]["containers"]
        assert set(container) == {"name", "image", "env", "resources"}
        assert container["env"][0]["name"] == "DETOX_GUARD_API_KEYS"
    serve = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = serve.applications
    file = RayFile.told(application.args)
    assert file.replicas_of("qwen").gpus == 1
    assert isinstance(app(application.args), Application)


def test_tables_beside_a_file_are_refused() -> None:
    with pytest.raises(InvalidParamsError, match="alone"):
        RayFile.told({"config": "serve.toml", "server": {}})


@pytest.mark.parametrize(
    ("tables", "field"),
    [
        ({"ray": {"gateways": 0}}, "ray.gateways"),
        ({"ray": {"replicas": {"cpu": 1}}}, "ray.replicas.cpu"),
        ({"server": {"port": -1}}, "server.port"),
        ({**TWO, "ray": {"models": {"c": {}}}}, "ray.models.c"),
        ({**TWO, "ray": {"multiplexed": 1, "models": {"a": {}}}}, "ray.models"),
        ({"models": {"a/b": {}, "a-b": {}}}, "models"),
        ({"models": {"a": {"upstream": "http://127.0.0.1:1/v1"}}}, "models.a.upstream"),
        ({"models": {"a": {"model": "x"}}, "ray": {"replicas": {"gpus": 2}}}, "models.a.loading.device_map"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(tables: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError) as raised:
        app(tables)
    assert field.split(".")[-1] in str(raised.value)


def test_several_gpus_go_with_a_device_map() -> None:
    one = {"model": "x", "loading": {"device_map": "auto", "max_memory": {"0": "20GiB", "1": "20GiB"}}}
    app({"models": {"a": one}, "ray": {"models": {"a": {"gpus": 2}}}})
