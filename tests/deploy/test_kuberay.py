"""The manifest for KubeRay: valid for its definition and for Kubernetes, and of one mind with the rest."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from services.cli.main import app
from services.cluster import deploy
from services.common.settings import GatewaySettings, RouterSettings

from .engine import ROOT

Manifest = dict[str, Any]
KUBERNETES = "1.31"
SCHEMA = Path(__file__).parent / "data" / "raycluster.yaml"


@pytest.fixture
def manifests() -> dict[str, Manifest]:
    """By kind."""
    listed = yaml.safe_load_all((ROOT / "deploy" / "kuberay" / "qaq.yaml").read_text())
    return {manifest["kind"]: copy.deepcopy(manifest) for manifest in listed}


def closed(schema: Any) -> Any:
    """The schema, where objects with known fields have no others: Kubernetes would drop those."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {key: closed(value) for key, value in schema.items()}
    return inside | ({"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {})


def check(cluster: Manifest) -> None:
    """Raises a ValidationError of one of the two schemas."""
    import kubernetes_validate

    jsonschema.validate(cluster["spec"], closed(yaml.safe_load(SCHEMA.read_text())))
    for group in groups(cluster):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def groups(cluster: Manifest) -> list[Manifest]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def test_kuberay_and_kubernetes_take_it(manifests: dict[str, Manifest]) -> None:
    import kubernetes_validate

    assert manifests["RayCluster"]["apiVersion"] == "ray.io/v1"
    check(manifests["RayCluster"])
    for kind in ("Service", "Job"):
        kubernetes_validate.validate(manifests[kind], KUBERNETES, strict=True)


def test_a_wrong_one_is_noticed(manifests: dict[str, Manifest]) -> None:
    import kubernetes_validate

    for wrong in (
        {"rayStartParam": {}},
        {"rayStartParams": {"num-cpus": 2}},
        {"template": {"spec": {"container": []}}},
    ):
        cluster = copy.deepcopy(manifests["RayCluster"])
        cluster["spec"]["headGroupSpec"] |= wrong
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(cluster)


def test_it_is_of_one_ray_and_one_image(manifests: dict[str, Manifest]) -> None:
    """Ray's client and all nodes must have the same version."""
    cluster = manifests["RayCluster"]
    assert cluster["spec"]["rayVersion"] == version("ray")
    assert f"ray=={version('ray')}\n" in (ROOT / "constraints.txt").read_text()
    pods = [*(group["template"]["spec"] for group in groups(cluster)), manifests["Job"]["spec"]["template"]["spec"]]
    assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1


def test_clients_find_what_runs_on_the_head(manifests: dict[str, Manifest]) -> None:
    cluster, service = manifests["RayCluster"], manifests["Service"]
    head = groups(cluster)[0]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    defaults = {
        "router": RouterSettings.model_fields["port"].default,
        "gateway": GatewaySettings.model_fields["port"].default,
    }
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == defaults
    assert defaults.items() <= ports.items()
    assert service["spec"]["selector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    arguments = container(manifests)["args"]
    assert arguments[arguments.index("--host") + 1] == service["metadata"]["name"]


def container(manifests: dict[str, Manifest]) -> Manifest:
    (found,) = manifests["Job"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_the_job_is_a_command_that_there_is(manifests: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """It fits the cluster: address, token, and as many workers as there are nodes with their CPUs."""
    asked: list[tuple[Any, ...]] = []

    def up(*given: Any) -> None:
        asked.append(given)
        raise OSError("nothing runs here")

    monkeypatch.setattr(deploy, "up", up)
    job, cluster = container(manifests), manifests["RayCluster"]
    CliRunner().invoke(app, [*job["command"][1:], *job["args"]], env={"QAQ_MODEL": "m"})
    settings, address, redis_url, hosts, _ = asked[0]
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    assert (settings.workers, settings.http_port, settings.https) == (workers["replicas"], 8000, True)
    assert settings.worker_cpus == float(workers["rayStartParams"]["num-cpus"])
    name = cluster["metadata"]["name"]
    assert (address, redis_url, hosts) == (f"ray://{name}-head-svc:10001", None, [name])
    given = {each["name"]: each for each in job["env"]}
    assert given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}
    assert cluster["spec"]["authOptions"] == {"mode": given["RAY_AUTH_MODE"]["value"]}
    assert "QAQ_REDIS_URL" in given
