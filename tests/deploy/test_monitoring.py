"""Prometheus' configuration and the dashboard, against the metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from services.common import metrics
from services.common.roles import server_name

from .engine import ROOT
from .queries import asked, exposed, wrong

PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "helm" / "qaq" / "dashboards" / "qaq.json").read_text())
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.mark.parametrize(("title", "query"), queries())
def test_a_query_asks_for_what_is_exposed(title: str, query: str) -> None:
    assert asked(query)
    assert wrong(query) == []


@pytest.mark.parametrize(
    ("query", "lost"),
    [
        ("rate(qaq_kv_bytes_total[5m])", ["qaq_kv_bytes_total"]),
        ("sum by (model) (qaq_kv_bytes)", ["label model"]),
        ('qaq_kv_bytes{kind="device"}', ["label kind"]),
        ("qaq_http_seconds", ["qaq_http_seconds"]),
    ],
)
def test_a_wrong_query_is_noticed(query: str, lost: list[str]) -> None:
    assert wrong(query) == lost


def test_a_query_that_is_no_promql_is_noticed() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        asked("sum by (job qaq_kv_bytes")


def test_most_metrics_are_shown() -> None:
    ours = {name for name in exposed() if name.startswith("qaq_") and not name.endswith(("_sum", "_count"))}
    shown = {name for _, query in queries() for name in asked(query)}
    assert len(ours & shown) > 0.7 * len(ours), sorted(ours - shown)


def test_every_metric_is_in_its_document() -> None:
    """With its type, its labels and what it counts."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(qaq_\w+)` \| (\w+) \| (.*?) \| (.+?) \| (.+) \|$", page, re.MULTILINE)
    written = {name: (kind, set(re.findall(r"`(\w+)`", labels)), told) for name, kind, labels, _, told in rows}
    ours = [metric for metric in vars(metrics).values() if str(getattr(metric, "_name", "")).startswith("qaq_")]
    declared = {
        metric._name + ("_total" if metric._type == "counter" else ""): (
            metric._type,
            {*metric._labelnames},
            metric._documentation,
        )
        for metric in ours
    }
    assert written == declared


def test_panels_do_not_lie_over_each_other() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_role_is_scraped_with_a_certificate() -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]}
    roles = {name: service for name, service in SERVICES.items() if "QAQ_PORT" in service.get("environment", {})}
    assert set(jobs) == set(roles)
    for role, job in jobs.items():
        assert job["scheme"] == "https"
        assert job["tls_config"]["server_name"] == server_name(role)
        (found,) = job["dns_sd_configs"]
        assert found["names"] == [role]
        assert str(found["port"]) == roles[role]["environment"]["QAQ_METRICS_PORT"]


def test_prometheus_takes_its_configuration() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    checked = subprocess.run([promtool, "check", "config", "--syntax-only", PROMETHEUS], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
