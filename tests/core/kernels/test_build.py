"""The package's C++ is optional: without a compiler the build succeeds and leaves it out."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_a_build_without_a_compiler_succeeds(tmp_path: Path) -> None:
    built, objects = tmp_path / "lib", tmp_path / "objects"
    command = ["build_ext", "--build-lib", str(built), "--build-temp", str(objects)]
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", *command],
        cwd=ROOT,
        env={**os.environ, "CC": "false", "CXX": "false", "QAQ_CUDA": "1", "QAQ_NVCC": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert 'building extension "qaq_core.kernels._cpu" failed' in done.stdout + done.stderr
    assert not list(built.rglob("*.so"))
    assert "CUDA kernels are left out: false failed for sm_" in done.stdout + done.stderr


def test_the_build_lists_every_source() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    for key, suffix in (("sources", "*.cpp"), ("depends", "*.h")):
        files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "qaq_core/kernels/csrc").glob(suffix))
        assert sorted(settings[key]) == files
