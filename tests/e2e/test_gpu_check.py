"""`qaq bench gpu --check --emulated`: an answer of a stack whose worker attends with emulated CUDA kernels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .command import qaq


@pytest.mark.ray
def test_a_stack_answers_with_emulated_kernels_and_exceptions(
    model_path: Path, state_directory: Path, tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for a CPU")
    path = tmp_path / "found.json"
    given = ("--parts", "served", "--model", model_path, "--json", path)
    done = qaq("bench", "gpu", "--check", "--emulated", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = json.loads(path.read_text())
    found = dict(table["rows"])
    assert all(int(number) > 0 for number in found["exceptions; rows quantized again"].split("; "))
    assert int(found["originals in Redis, KiB"]) > 0
