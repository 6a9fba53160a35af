"""The layouts of structures in Python and in C++ are compared when the library is loaded."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from qaq_core.kernels import library, load_library
from qaq_core.kernels.structures import STRUCTURES, SideRows, compiled, declared, difference

CSRC = Path(library.__file__).parent / "csrc"


def test_the_library_has_the_structures_that_python_declares() -> None:
    if load_library() is None:
        pytest.skip("the C++ library is not built")
    assert difference(declared(), compiled(load_library())) is None


def test_a_structure_that_python_declares_otherwise_is_named() -> None:
    class Swapped(ctypes.Structure):
        _fields_ = [SideRows._fields_[1], SideRows._fields_[0], *SideRows._fields_[2:]]

    ours, theirs = declared({**STRUCTURES, "QaqSideRows": Swapped}), declared()
    assert difference(ours, theirs) == (
        "QaqSideRows.count is 4 bytes at offset 4 in the library, 4 bytes at offset 0 in Python"
    )


def test_every_structure_of_the_headers_is_declared() -> None:
    text = "".join(path.read_text() for path in CSRC.glob("*.h"))
    names = {line.split()[1] for line in text.splitlines() if line.startswith("struct Qaq")}
    assert names == {*STRUCTURES, "QaqField"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "before", "after", "message"),
    [
        ("allocate.h", "float own, before;", "double own, before;", "QaqWeigh"),
        ("repack.h", "int32_t heads, tokens;", "int32_t tokens, heads;", "QaqNarrow.heads"),
        ("interface.h", "QAQ_INTERFACE = ", "QAQ_INTERFACE = 1", "interface 1"),
    ],
)
def test_a_library_with_another_structure_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, header: str, before: str, after: str, message: str
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    sources, built = shutil.copytree(CSRC, tmp_path / "csrc"), tmp_path / "library.so"
    text = (sources / header).read_text()
    assert before in text
    (sources / header).write_text(text.replace(before, after))
    command = ["g++", "-std=c++17", "-fPIC", "-shared", sources / "interface.cpp", "-o", built]
    subprocess.run(command, check=True, timeout=60)
    monkeypatch.setenv("QAQ_LIBRARY", str(built))
    loaded, reason = library._load.__wrapped__()
    assert loaded is None
    assert reason is not None
    assert message in reason
    assert "reinstall" in reason
