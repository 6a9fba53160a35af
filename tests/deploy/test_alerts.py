"""Prometheus' alerts: valid, about metrics that there are, and each of them fires when it should and not otherwise."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.test_docs import anchors

from .engine import ROOT
from .queries import asked, wrong

FILE = ROOT / "deploy" / "prometheus" / "alerts.yml"
CASES = Path(__file__).with_name("alerts.yml")
RULES: list[dict[str, Any]] = [rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]]
NAMES = [rule["alert"] for rule in RULES]


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    return found


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_asks_for_what_is_exposed_and_says_what_to_do(rule: dict[str, Any]) -> None:
    assert asked(rule["expr"])
    assert wrong(rule["expr"]) == []
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    assert anchor in anchors(ROOT / page)
    assert rule["annotations"]["action"].endswith(".")
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
    by = re.search(r"by \(([^)]*)\)", rule["expr"])
    assert named <= ({label.strip() for label in by[1].split(",")} if by else {"job", "instance"})


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    assert sorted(case["alertname"] for case in cases if case["exp_alerts"]) == sorted(NAMES)
    assert sorted(case["alertname"] for case in cases if not case["exp_alerts"]) == sorted(NAMES)


def test_prometheus_takes_the_alerts(promtool: str) -> None:
    checked = subprocess.run([promtool, "check", "rules", FILE], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_fire_when_they_should(promtool: str, tmp_path: Path) -> None:
    """By Prometheus' own engine. Annotations are left out: a case would have to repeat them."""
    rules = yaml.safe_load(FILE.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "cases.yml").write_text(CASES.read_text())
    tested = subprocess.run([promtool, "test", "rules", "cases.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr
