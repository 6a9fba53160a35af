"""Triton's kernels as its compiler sees them; what they compute is held to in test_kernels.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qaq_core.attention import triton, triton_table
from qaq_core.base.widths import HALF, WIDTHS

language = pytest.importorskip("triton.language")
from qaq_core.attention import triton_kernels  # noqa: E402

# In a process of its own, where they are not interpreted; it imports nothing of QAQ's, which takes longer.
COMPILE = """
import importlib.util, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("triton_kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = kernels
spec.loader.exec_module(kernels)
FLOATS = "query transformed mean angles levels scales peaks masses sums out_exact out_packed out_mass norms".split()
TYPES = {"sequences": "*i64", "widths": "*i32", "depth": "*i32", "units": "*i32"} | dict.fromkeys(FLOATS, "*fp32")


def compiled(kernel, **constants):
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


split = dict(HALF_DIM=16, OCTETS=4, FIRST_OCTETS=1, SPLIT=512, TILE=16)
made = [
    compiled(kernels.packed_split, **split, PARTS=2, BY_META=True, HAS_OFFSET=False, HAS_MEAN=True),
    compiled(kernels.packed_split, **split, PARTS=1, BY_META=False, HAS_OFFSET=True, HAS_MEAN=False),
    compiled(kernels.merge, OCTETS=4, EXACT_TYPE=triton.language.bfloat16, TILE=16),
    compiled(kernels.observe, TILE=512),
]
print(len(made), all(".entry" in ptx for ptx in made))
"""


@pytest.mark.slow
def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    """Not run there: no GPU is needed for it."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, triton_kernels.__file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "True"]


def test_constants_are_the_same_on_both_sides() -> None:
    constants = {n: v.value for n, v in vars(triton_kernels).items() if isinstance(v, language.constexpr)}
    assert constants.pop("NIBBLE") == triton_table.NIBBLE
    assert constants.pop("GROUP") == triton.GROUP
    assert constants.pop("HALF") == WIDTHS.index(HALF)
    assert constants.pop("MAX") == triton_table.STATISTICS["max"]
    count = constants.pop("FIELDS")
    assert sorted(constants.values()) == list(range(count))
