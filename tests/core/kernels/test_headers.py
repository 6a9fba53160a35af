"""Every C++ header compiles alone: it includes what it needs."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from qaq_core.kernels import library

CSRC = Path(library.__file__).parent / "csrc"
HEADERS = sorted(path.name for path in CSRC.glob("*.h"))


@pytest.mark.slow
@pytest.mark.parametrize("header", HEADERS)
def test_a_header_compiles_alone(header: str) -> None:
    """Without flags: headers of an instruction set choose it themselves."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    if "avx" in header and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("another processor's instruction set")
    warnings = ["-Wall", "-Wno-psabi", "-Wno-unused-function", "-Werror"]
    done = subprocess.run(
        ["g++", "-fsyntax-only", "-std=c++17", *warnings, "-I", str(CSRC), "-x", "c++", "-"],
        input=f'#include "{header}"\n',
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_headers_are_included_once_and_set_no_target_around_includes() -> None:
    for header in HEADERS:
        lines = (CSRC / header).read_text().splitlines()
        assert "#pragma once" in lines, header
        begin = next((i for i, line in enumerate(lines) if line == "QAQ_BEGIN_TARGET"), len(lines))
        assert not [line for line in lines[begin:] if line.startswith("#include")], header
