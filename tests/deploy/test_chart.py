"""The Helm chart: rendered by the real Helm, valid for Kubernetes, and of one mind with the rest."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.roles import ROLES as CERTIFIED
from services.common.roles import server_name
from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings

from .chart import CHART, RELEASE, Manifest, Rendered, render
from .engine import ROOT
from .queries import wrong

ROLES = {
    "router": RouterSettings,
    "gateway": GatewaySettings,
    "originals": OriginalsSettings,
    "worker": WorkerSettings,
}
# Kinds of Prometheus' operator and of KEDA, of which kubernetes-validate has no schema.
OTHERS = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
KUBERNETES = "1.31"
EVERYTHING: dict[str, Any] = {
    "model": "Qwen/Qwen3-8B",
    "settings": {"log_level": "debug"},
    "worker": {
        "gpus": 1,
        "settings": {"target_bits": 3, "log_level": "info"},
        "autoscaling": {"enabled": True},
        "cache": {"claim": "models"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "nodeSelector": {"kind": "gpu"},
    },
    "image": {"repository": "registry.example.com/qaq", "pullSecrets": [{"name": "registry"}]},
    "gateway": {"service": {"type": "LoadBalancer", "annotations": {"a": "b"}}},
    "networkPolicies": {
        "gatewayClients": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}],
        "routerClients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
    },
    "monitoring": {"serviceMonitors": True, "dashboard": True, "alerts": True, "labels": {"release": "prometheus"}},
    "redis": {"storage": {"className": "fast"}},
}
EXTERNAL: dict[str, Any] = {
    "redis": {"enabled": False},
    "disruptionBudgets": False,
    "networkPolicies": {"enabled": False},
}


@pytest.fixture(scope="module")
def plain() -> Rendered:
    return Rendered()


@pytest.fixture(scope="module")
def full() -> Rendered:
    return Rendered(EVERYTHING)


@pytest.fixture(scope="module")
def external() -> Rendered:
    return Rendered(EXTERNAL)


@pytest.mark.parametrize("of", ["plain", "full", "external"])
def test_kubernetes_takes_it(of: str, request: pytest.FixtureRequest) -> None:
    import kubernetes_validate

    rendered: Rendered = request.getfixturevalue(of)
    for manifest in rendered.manifests:
        if manifest["kind"] not in OTHERS:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_wrong_manifest_is_noticed(plain: Rendered) -> None:
    import kubernetes_validate

    manifest = json.loads(json.dumps(plain.all("Deployment")["qaq-router"]))
    manifest["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"worker": {"replica": 2}}, "replica"),
        ({"worker": {"replicas": "two"}}, "replicas"),
        ({"redis": {"maxmemory": "lots"}}, "maxmemory"),
        ({"settings": {"port": 1}}, "port"),
        ({"router": {"resources": {"requests": {"memory": "much"}}}}, "memory"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(Exception, match=named):
        render(values)


def test_every_value_is_in_the_schema() -> None:
    """Helm refuses values that the schema lacks; this holds that it lacks none, and describes no others."""

    def same(values: dict[str, Any], schema: dict[str, Any], at: str) -> None:
        properties = schema.get("properties")
        if properties is None:
            return
        assert set(values) == set(properties) - {"global"}, at
        for name, value in values.items():
            if isinstance(value, dict):
                same(value, properties[name], f"{at}.{name}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    same(values, json.loads((CHART / "values.schema.json").read_text()), "values")


@pytest.mark.parametrize("role", [*ROLES, "redis"])
def test_a_pod_has_few_rights_limits_and_probes(plain: Rendered, role: str) -> None:
    pod, container = plain.pod(role), plain.container(role)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["serviceAccountName"] in plain.all("ServiceAccount")
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert set(container[probe]) & {"exec", "httpGet", "tcpSocket"}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_given_only_settings_that_it_has(full: Rendered, role: str) -> None:
    names = [name for name in full.environment(role) if name.startswith("QAQ_")]
    assert [name for name in names if name.removeprefix("QAQ_").lower() not in ROLES[role].model_fields] == []


@pytest.mark.parametrize("role", ROLES)
def test_a_health_check_asks_the_port_that_is_bound(plain: Rendered, role: str) -> None:
    port = plain.environment(role)["QAQ_PORT"]
    container = plain.container(role)
    assert {str(entry["containerPort"]) for entry in container["ports"]} == {port, "9100"}
    if role == "gateway":
        assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "main", "scheme": "HTTPS"}
    else:
        assert container["readinessProbe"]["exec"]["command"] == ["qaq", "health", f"127.0.0.1:{port}"]


def test_settings_of_a_role_win_over_those_of_all(full: Rendered) -> None:
    assert full.environment("router")["QAQ_LOG_LEVEL"] == "debug"
    assert full.environment("worker")["QAQ_LOG_LEVEL"] == "info"
    assert full.environment("worker")["QAQ_TARGET_BITS"] == "3"


def test_workers_on_gpus(full: Rendered, plain: Rendered) -> None:
    container = full.container("worker")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"] == "registry.example.com/qaq:cuda"
    assert full.environment("worker")["QAQ_DEVICE"] == "cuda"
    assert full.container("router")["image"] == "registry.example.com/qaq:cpu"
    assert "QAQ_DEVICE" not in plain.environment("worker")


def test_an_external_redis(external: Rendered, plain: Rendered) -> None:
    assert "qaq-redis" in plain.all("StatefulSet")
    assert external.kinds() == {"Deployment", "Service", "ServiceAccount"}


def test_redis_is_configured_as_in_compose(plain: Rendered) -> None:
    def directives(text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    chart = plain.all("ConfigMap")["qaq-redis"]["data"]["redis.conf"]
    assert directives(chart) == directives((ROOT / "deploy" / "redis.conf").read_text())
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["redis"]
    assert plain.container("redis")["image"] in compose["image"]
    security = plain.pod("redis")["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == compose["user"]


def test_who_may_reach_whom(plain: Rendered) -> None:
    """The connections of docs/security.md, and no others."""

    def callers(policy: Manifest, port: int) -> set[str]:
        rules = [rule for rule in policy["spec"]["ingress"] if rule["ports"] == [{"port": port}]]
        return {
            peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] if "podSelector" in peer else "elsewhere"
            for rule in rules
            for peer in rule.get("from", [{}])
        }

    policies = plain.all("NetworkPolicy")
    assert callers(policies["qaq-worker"], 7710) == {"router"}
    assert callers(policies["qaq-originals"], 7720) == {"worker"}
    assert callers(policies["qaq-router"], 7700) == {"gateway"}
    assert callers(policies["qaq-gateway"], 8000) == {"elsewhere"}
    assert callers(policies["qaq-redis"], 6379) == set(ROLES)


def test_selectors_find_their_pods(full: Rendered) -> None:
    labels = {
        name: manifest["spec"]["template"]["metadata"]["labels"]
        for kind in ("Deployment", "StatefulSet")
        for name, manifest in full.all(kind).items()
    }
    for name, service in full.all("Service").items():
        assert service["spec"]["selector"].items() <= labels[name].items()
    for kind in ("PodDisruptionBudget", "ServiceMonitor"):
        for name, manifest in full.all(kind).items():
            assert manifest["spec"]["selector"]["matchLabels"].items() <= labels[name].items()


def test_metrics_are_read_with_a_certificate(full: Rendered) -> None:
    monitors = full.all("ServiceMonitor")
    assert set(monitors) == {f"{RELEASE}-{role}" for role in ROLES}
    for role in ROLES:
        (endpoint,) = monitors[f"{RELEASE}-{role}"]["spec"]["endpoints"]
        assert endpoint["tlsConfig"]["serverName"] == server_name(role)  # type: ignore[arg-type]
        assert endpoint["port"] == "metrics"


def test_the_alerts_are_those_of_compose(full: Rendered, plain: Rendered) -> None:
    told = full.all("PrometheusRule")["qaq-alerts"]["spec"]
    assert told == yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert "PrometheusRule" not in plain.kinds()


def test_the_dashboard_is_that_of_compose(full: Rendered) -> None:
    told = json.loads(full.all("ConfigMap")["qaq-dashboard"]["data"]["qaq.json"])
    assert told == json.loads((CHART / "dashboards" / "qaq.json").read_text())


def test_autoscaling_asks_for_what_is_exposed(full: Rendered) -> None:
    scaled = full.all("ScaledObject")["qaq-worker"]["spec"]
    assert scaled["scaleTargetRef"]["name"] in full.all("Deployment")
    assert "replicas" not in full.all("Deployment")["qaq-worker"]["spec"]
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["threshold"] == "6"
    assert wrong(trigger["metadata"]["query"]) == ["label namespace"]  # which Prometheus adds to every pod's


def test_secrets_have_what_the_pods_read(full: Rendered, tmp_path: Path) -> None:
    """From what make-secrets writes to what is mounted."""
    made = tmp_path / "secrets"
    for role in CERTIFIED:
        (made / role).mkdir(parents=True)
        for name in ("ca.pem", "cert.pem", "key.pem"):
            (made / role / name).write_text(f"{name} of {role}\n" * 20)
        (made / role / "redis.env").write_text(f"QAQ_REDIS_URL=rediss://{role}:p@qaq-redis:6379/0\n")
    for role, name in (("worker", "pages-secret"), ("router", "tenants.json"), ("worker", "hf-token")):
        (made / role / name).write_text("")
    printed = subprocess.run(
        [ROOT / "deploy" / "kubernetes-secrets", made, RELEASE], capture_output=True, text=True, check=True
    ).stdout
    secrets = {secret["metadata"]["name"]: secret["data"] for secret in yaml.safe_load_all(printed)}
    assert base64.b64decode(secrets["qaq-worker"]["redis-url"]) == b"rediss://worker:p@qaq-redis:6379/0"
    assert base64.b64decode(secrets["qaq-router"]["key.pem"]) == (made / "router" / "key.pem").read_bytes()
    for role in ROLES:
        volumes = {volume["name"]: volume for volume in full.pod(role)["volumes"]}
        assert volumes["secrets"]["secret"]["secretName"] in secrets
    for monitor in full.all("ServiceMonitor").values():
        for part in monitor["spec"]["endpoints"][0]["tlsConfig"].values():
            if isinstance(part, dict):
                at = part.get("secret", part)
                assert at["key"] in secrets[at["name"]]
