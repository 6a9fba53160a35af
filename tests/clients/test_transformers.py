"""transformers' own tests of generation, with QAQCache in the place of DynamicCache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .conftest import PROGRAMS, ROOT

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
# What QAQCache refuses, by the class of its error: beams, drafts, head_dim 8, models without attention of this kind.
REFUSED = ("ConfigError", "UnsupportedModelError")


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str, tmp_path: Path) -> None:
    checkout = os.environ.get("QAQ_TRANSFORMERS")
    if not checkout:
        pytest.skip("needs a checkout of transformers: make clients TRANSFORMERS=path")
    report = tmp_path / "report.xml"
    path = [str(PROGRAMS), str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", f"tests/models/{family}", "-q", "-p", "qaq_generation"),
            *("-p", "no:cacheprovider", "-k", "generate and not Integration", f"--junitxml={report}"),
        ],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    cases = ElementTree.parse(report).findall(".//testcase")
    failed = {str(case.get("name")): case.find("failure") for case in cases if case.find("failure") is not None}
    unexpected = {
        name: failure.get("message")
        for name, failure in failed.items()
        if failure is not None and not any(refusal in str(failure.text) for refusal in REFUSED)
    }
    passed = [case for case in cases if len(case) == 0]
    assert len(passed) > 10
    assert not unexpected
