"""transformers' own tests of generation, with QAQCache in the place of DynamicCache."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .conftest import PROGRAMS, ROOT

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "phi3", "smollm3", "gpt2", "mixtral")
# Packages that transformers' tests import.
NEEDED = ("parameterized", "httpx")
# How QAQCache refuses: here masks with holes, which `generate` makes of random prompts with the padding token in them.
REFUSED = ("qaq_core.base.errors.ConfigError", "qaq_core.base.errors.UnsupportedModelError")


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str, tmp_path: Path) -> None:
    checkout = os.environ.get("QAQ_TRANSFORMERS")
    if not checkout:
        pytest.skip("needs a checkout of transformers: make clients TRANSFORMERS=path")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"transformers' tests need more packages: pip install {' '.join(missing)}")
    report = tmp_path / "report.xml"
    path = [str(PROGRAMS), str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", f"tests/models/{family}", "-q", "-p", "qaq_generation"),
            # Those that compile make static caches.
            *("-p", "no:cacheprovider", "-k", "generate and not Integration and not compil", f"--junitxml={report}"),
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
    assert not unexpected
    assert sum(map(_used_the_cache, cases)) > 14


def _used_the_cache(case: ElementTree.Element) -> bool:
    """Whether a test has passed with a QAQCache in it."""
    made = case.find('.//property[@name="caches"]')
    return case.find("failure") is None and made is not None and int(made.get("value", 0)) > 0
