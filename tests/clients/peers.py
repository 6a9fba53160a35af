"""Test suites of other servers, run against the gateway, and what became of their tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .conftest import PROGRAMS


@dataclass
class Results:
    """Names of tests.

    Attributes:
        refused: failed behind a request that the gateway refused, with that refusal.
        differ: failed behind an answer, with the message of the failure.
        broken: got an answer of 500 or more, whatever became of them.
    """

    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    differ: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def unexplained(self, differences: Mapping[str, str]) -> dict[str, str]:
        """The tests that differ and that no pattern of `differences` names."""
        return {name: told for name, told in self.differ.items() if not any(fnmatch(name, p) for p in differences)}

    def __str__(self) -> str:
        kinds = ("passed", "skipped", "refused", "differ", "broken")
        counts = ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in kinds)
        refusals = Counter(told for told in self.refused.values())
        lines = [f"  {count:3} {told}" for told, count in refusals.most_common()]
        lines += [
            f"  {kind} {name}: {told}" for kind in ("differ", "broken") for name, told in getattr(self, kind).items()
        ]
        return "\n".join([counts, *lines])


def checkout(variable: str, what: str) -> Path:
    """The checkout that an environment variable names, or a skip."""
    given = os.environ.get(variable)
    if not given:
        pytest.skip(f"needs a checkout of {what}: make clients {variable.removeprefix('QAQ_')}=path")
    return Path(given).resolve()


def run(plugin: str, tests: Sequence[str], cwd: Path, report: Path, *options: str, **environment: str) -> Results:
    """Runs tests with a plugin of `programs`. What they print is beside their report."""
    path = [str(PROGRAMS), os.environ.get("PYTHONPATH", "")]
    told = report.with_suffix(".log")
    with told.open("w") as output:
        subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "pytest",
                    *tests,
                    "-v",
                    "-p",
                    plugin,
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "no:xdist",
                ),
                *("-o", "addopts=", "--timeout=300", "--tb=native", f"--junitxml={report}", *options),
            ],
            cwd=cwd,
            env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    assert report.exists(), told.read_text()[-8000:]
    return read(report)


def read(report: Path) -> Results:
    """A report of JUnit with the notes of `qaq_front`."""
    results = Results()
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{str(case.get('classname')).rpartition('.')[2]}::{case.get('name')}"
        noted = {each.get("name"): json.loads(each.get("value", "[]")) for each in case.iter("property")}
        statuses, refusals = noted.get("statuses", []), noted.get("refusals", [])
        wrong = [case.find(kind) for kind in ("failure", "error")]
        messages = [str(each.get("message")) for each in wrong if each is not None]
        if any(status >= 500 for status in statuses):
            results.broken[name] = next(told for told in refusals if told[0] == "5")
        if (skip := case.find("skipped")) is not None:
            results.skipped[name] = str(skip.get("message"))
        elif not messages:
            results.passed.append(name)
        elif statuses and statuses[-1] >= 400:
            results.refused[name] = refusals[-1]
        else:
            results.differ[name] = messages[0][:300]
    return results
