"""What the compiler makes of the CUDA kernels; nothing of it is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qaq_core.kernels.cuda import build
from qaq_core.kernels.cuda.counts import Counts, Profile, UnknownCode, count, count_code, find_disassembler, profile
from qaq_eval.speed.gpu_static import SHARES, rows_of

REPORT = """
ptxas info    : Compiling entry function 'qaq_split_64' for 'sm_90'
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 28432 bytes smem
ptxas info    : Compiling entry function 'qaq_observe' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 33 registers, used 0 barriers
"""


@pytest.mark.slow
def test_nothing_is_spilled_and_instructions_are_as_few_as_documented(tmp_path: Path) -> None:
    """Of the shape that docs/gpu.md speaks of: 32 query heads, 8 KV heads, head_dim 128, widths of SmolLM2."""
    nvcc, disassembler = build.find_nvcc(), find_disassembler()
    if nvcc is None:
        pytest.skip(str(build.missing()))
    kernels = build.compile_kernels(nvcc, "sm_90", 128, tmp_path)
    of_the_head_dim = {f"qaq_{name}_128" for name in ("prepare", "split", "merge", "rotate", "encode")}
    assert {kernel.kernel for kernel in kernels} == of_the_head_dim | {"qaq_observe", "qaq_weave"}
    assert {kernel.kernel: kernel.spills for kernel in kernels if kernel.spills} == {}
    if disassembler is None:
        pytest.skip("there is no cuobjdump")
    counts = count(tmp_path / build.cubin_name("sm_90", 128), 128, disassembler)
    assert counts.keys[2] < counts.keys[4] < counts.keys[6]
    assert counts.per_number(rows_of(SHARES, 128)) < 6.6


def test_the_assembler_s_report_is_read() -> None:
    assert build.read_report(REPORT) == [
        build.Compiled("qaq_split_64", 128, 12, 28432),
        build.Compiled("qaq_observe", 33, 0, 0),
    ]


def test_a_compiler_that_fails_or_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="false failed for sm_80"):
        build.compile_kernels("false", "sm_80", 64, tmp_path)
    with pytest.raises(RuntimeError, match="no-such-nvcc cannot be run"):
        build.compile_kernels("no-such-nvcc", "sm_80", 64, tmp_path)
    monkeypatch.setenv("QAQ_NVCC", "no-such-nvcc")
    assert build.find_nvcc() == "no-such-nvcc"


def test_rows_take_the_steps_of_their_deepest_octets() -> None:
    order = [0, 0, 1, 2, 3, 4, 5, 6, *(octet for octet in range(8) for _ in range(7))][:64]
    full = profile(order, {0.0: 0.5, 1.0: 0.5}, 64)
    assert full == Profile({2: 0.5, 1: 0.5}, 0.5, 8)
    assert profile(order, {0.0: 0.5, 1.0: 0.5}, 128) == Profile({2: 0.5, 1: 1.5}, 0.5, 16)
    assert profile(order, {1.0: 0.51, 0.0: 0.49}, 64, block=64).tiles == 1.0
    counts = Counts(dict.fromkeys(range(1, 7), 100), dict.fromkeys(range(1, 7), 200), 10, 20, 30.0, 40.0, 0)
    assert counts.per_number((full, full)) == (30 + 40 + 0.5 * 30 + 300) / 128


@pytest.mark.parametrize("code", [[(0, "NOP")], [(16 * i, "HMMA R0") for i in range(8)]])
def test_code_that_is_arranged_otherwise_is_not_counted(code: Sequence[tuple[int, str]]) -> None:
    with pytest.raises(UnknownCode):
        count_code(list(code), 64)


def test_shares_of_rows_are_all_rows() -> None:
    assert [round(sum(mine.values()), 3) for mine in SHARES] == [1.0, 1.0]
