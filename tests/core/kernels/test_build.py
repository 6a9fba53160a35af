"""The package's C++ is optional: without a compiler the build succeeds and leaves it out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_build_without_a_compiler_succeeds(tmp_path: Path) -> None:
    built, objects = tmp_path / "lib", tmp_path / "objects"
    command = ["build_ext", "--build-lib", str(built), "--build-temp", str(objects)]
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", *command],
        cwd=ROOT,
        env={**os.environ, "CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert 'building extension "qaq_core.kernels.library._cpu" failed' in done.stdout + done.stderr
    assert not list(built.rglob("*.so"))
