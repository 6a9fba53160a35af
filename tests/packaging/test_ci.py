"""The CI workflow: valid, and for every Python that the package is made for."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import yaml

from .conftest import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_workflow_is_valid_by_its_schema() -> None:
    """check-jsonschema brings the schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    checked = subprocess.run([*command, WORKFLOW], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_it_runs_the_suite_with_every_python() -> None:
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["test"]
    pythons = job["strategy"]["matrix"]["python"]
    wheels = re.findall(r"cp3(\d+)-", PROJECT["tool"]["cibuildwheel"]["build"])
    assert pythons == [f"3.{minor}" for minor in wheels]
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}"
    assert any(step.get("run") == ".ci/run" for step in job["steps"])
    assert "make test" in (ROOT / ".ci" / "run").read_text()
