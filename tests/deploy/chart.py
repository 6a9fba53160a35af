"""deploy/helm/qaq, rendered by Helm."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from .engine import ROOT

CHART = ROOT / "deploy" / "helm" / "qaq"
RELEASE = "qaq"

Manifest = dict[str, Any]


def render(values: dict[str, Any]) -> list[Manifest]:
    """What `helm template` makes of some values, by Helm's own code, which helm-python-sdk brings.

    Raises:
        helm_python.HelmError: the values do not fit the schema, or a template fails.
    """
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this platform")
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        texts = chart.render(values=values, name=RELEASE, namespace="default")
    kept = [text for name, text in sorted(texts.items()) if name.endswith(".yaml")]
    return [manifest for text in kept for manifest in yaml.safe_load_all(text) if manifest]


class Rendered:
    """What `helm template` makes of some values."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        self.manifests = render(values or {})

    def kinds(self) -> set[str]:
        return {manifest["kind"] for manifest in self.manifests}

    def all(self, kind: str) -> dict[str, Manifest]:
        """The manifests of a kind, by their names."""
        return {manifest["metadata"]["name"]: manifest for manifest in self.manifests if manifest["kind"] == kind}

    def pod(self, role: str) -> Manifest:
        """The specification of a role's pods."""
        kind = "StatefulSet" if role == "redis" else "Deployment"
        spec: Manifest = self.all(kind)[f"{RELEASE}-{role}"]["spec"]["template"]["spec"]
        return spec

    def container(self, role: str) -> Manifest:
        (container,) = self.pod(role)["containers"]
        return dict(container)

    def environment(self, role: str) -> dict[str, str | None]:
        """The variables of a role; None where the value comes from elsewhere."""
        return {entry["name"]: entry.get("value") for entry in self.container(role)["env"]}
