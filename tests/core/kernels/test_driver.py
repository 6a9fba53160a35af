"""The loader of CUDA kernels, held to a library that pretends to be the driver. Nothing here is a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from qaq_core.attention.cuda import CudaAttention
from qaq_core.base.errors import KernelError
from qaq_core.kernels.cuda import structures
from qaq_core.kernels.cuda.build import HEAD_DIMS, SOURCES, cubin_name
from qaq_core.kernels.cuda.driver import DriverLauncher, architecture_for, load_driver, missing_kernels
from qaq_core.kernels.cuda.emulation import Emulation
from qaq_core.kernels.cuda.weave import CudaWeaver
from tests.core.conformance import CPU, subject

KINDS = {"prepare": structures.PrepareArgs, "split": structures.SplitArgs, "merge": structures.MergeArgs}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the pretended driver")
    made = tmp_path_factory.mktemp("driver") / "libcuda.so"
    source = Path(__file__).with_name("fake_driver.cpp")
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-I", SOURCES, "-o", str(made), str(source)]
    subprocess.run(command, check=True, timeout=300)
    return made


@pytest.fixture
def cubins(tmp_path: Path) -> Path:
    """Images that the pretended driver accepts: what names of kernels end with comes after ELF's first bytes."""
    for dim in HEAD_DIMS:
        (tmp_path / cubin_name("sm_80", dim)).write_bytes(b"\x7fELF_%d\0" % dim)
    return tmp_path


def recorded(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.fake_name.restype = ctypes.c_char_p
    library.fake_stream.restype = library.fake_args.restype = ctypes.c_void_p
    for name in ("fake_grid", "fake_block"):
        getattr(library, name).restype = ctypes.POINTER(ctypes.c_uint * 3)
    return library


def test_a_step_is_launched_with_what_its_kernels_are_declared_to_take(fake: Path, cubins: Path) -> None:
    weaver = CudaWeaver(Emulation())
    mine, library = subject("progressive", 64, 61, heads=2, layers=1, weaver=weaver), recorded(fake)
    launcher = DriverLauncher(CPU, (8, 0), lambda: 77, str(fake), cubins)
    before = library.fake_calls()
    CudaAttention(mine.quantizer.codec, CPU, launcher)(mine.query(0, 5), mine.tokens(0), 0.1)
    calls = range(before, library.fake_calls())
    assert [library.fake_name(i) for i in calls] == [b"qaq_prepare_64", b"qaq_split_64", b"qaq_merge_64"]
    assert [list(library.fake_grid(i).contents) for i in calls] == [[4, 1, 1], [1, 4, 1], [4, 1, 1]]
    assert {tuple(library.fake_block(i).contents) for i in calls} == {(128, 1, 1)}
    assert {library.fake_stream(i) for i in calls} == {77}
    for i, kind in zip(calls, KINDS.values(), strict=True):
        assert library.fake_size(i) == ctypes.sizeof(kind)
        batch = kind.from_buffer_copy(ctypes.string_at(library.fake_args(i), library.fake_size(i))).batch
        assert (batch.batch, batch.heads, batch.group, batch.quads, batch.splits) == (1, 2, 5, 2, 1)
        assert batch.scaling == pytest.approx(0.1)


def test_what_the_driver_refuses_is_an_error_that_says_so(fake: Path, cubins: Path) -> None:
    launcher = DriverLauncher(CPU, (8, 6), lambda: 0, str(fake), _named(cubins, "sm_86"))
    batch = structures.ObserveArgs()
    with pytest.raises(KernelError, match="cuLaunchKernel: CUDA error 1"):
        launcher.launch("observe", 64, (0, 1, 1), 256, batch)
    with pytest.raises(KernelError, match="cuModuleGetFunction: named symbol not found"):
        launcher.launch("nothing", 128, (1, 1, 1), 32, batch)
    (cubins / cubin_name("sm_86", 256)).write_bytes(b"not a cubin")
    with pytest.raises(KernelError, match="cuModuleLoadData: device kernel image is invalid"):
        launcher.launch("merge", 256, (1, 1, 1), 32, batch)
    (cubins / cubin_name("sm_86", 96)).unlink()
    with pytest.raises(KernelError, match="a head_dim of 96 cannot be read"):
        launcher.launch("merge", 96, (1, 1, 1), 32, batch)


def test_no_driver_is_an_error_that_says_so(cubins: Path) -> None:
    with pytest.raises(KernelError, match=r"the CUDA driver cannot be used: .*libnothing"):
        DriverLauncher(CPU, (8, 0), lambda: 0, "libnothing.so", cubins)
    with pytest.raises(KernelError, match="the CUDA driver cannot be used"):
        load_driver("libc.so.6")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((7, 5), None),
        ((10, 0), None),
        ((12, 0), None),
    ],
)
def test_a_device_gets_kernels_of_its_kind(capability: tuple[int, int], architecture: str | None) -> None:
    assert architecture_for(capability) == architecture


def test_devices_without_kernels_say_what_to_do(tmp_path: Path) -> None:
    assert missing_kernels((7, 5)) == "there are no CUDA kernels for compute capability 7.5"
    assert "run python -m qaq_core.kernels.cuda.build" in str(missing_kernels((9, 0), tmp_path))
    with pytest.raises(KernelError, match="are not built"):
        DriverLauncher(torch.device("cuda"), (9, 0), lambda: 0, folder=tmp_path)


def _named(folder: Path, architecture: str) -> Path:
    for dim in HEAD_DIMS:
        shutil.copy(folder / cubin_name("sm_80", dim), folder / cubin_name(architecture, dim))
    return folder
