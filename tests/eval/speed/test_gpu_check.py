"""The check of a GPU on a device that is pretended: nothing of it mixes devices, and it finds what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from qaq_core.attention.cuda_step import StepKernels
from qaq_core.cache import backends
from qaq_core.kernels.cuda.weave import CudaWeaver
from qaq_core.storage.tiled_pool import Tiles
from qaq_eval.speed.gpu_check import PARTS, Machine
from qaq_eval.speed.gpu_check import bench as bench_module
from qaq_eval.speed.gpu_check.conformance import conform

pytest.importorskip("tests.launches", exc_type=ImportError)

from tests.devices import DEVICE, PretendedDevice
from tests.launches import Emulated

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile kernels for a CPU")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with PretendedDevice(addresses=True) as device:
        launcher = Emulated(device)
        monkeypatch.setattr(backends, "cuda_launcher", lambda place: launcher)
        yield Machine(DEVICE, launcher, True, 1000)


@pytest.mark.parametrize("part", [name for name in PARTS if name != "served"])
def test_no_part_mixes_devices(machine: Machine, part: str) -> None:
    found = PARTS[part](machine, lambda what, share: None)
    assert found.rows
    assert not found.failed


def test_results_and_rows_that_are_wrong_are_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weave = StepKernels.layer, CudaWeaver.weave

    def twice(self: StepKernels, *args: object, **given: object) -> torch.Tensor:
        return layer(self, *args, **given) * 2  # type: ignore[arg-type]

    def spoiled(self: CudaWeaver, *args: object, **given: object) -> Tiles:
        made = weave(self, *args, **given)  # type: ignore[arg-type]
        if given.get("tiled") is False:
            made.data[:1] ^= 1
        return made

    monkeypatch.setattr(StepKernels, "layer", twice)
    found = conform(machine, lambda what, share: None)
    assert len(found.failed) == len(found.rows)
    monkeypatch.setattr(StepKernels, "layer", layer)
    monkeypatch.setattr(CudaWeaver, "weave", spoiled)
    found = conform(machine, lambda what, share: None)
    assert [row[3] for row in found.rows] == ["OTHERS"] * len(found.rows)
    assert len(found.failed) == len(found.rows)


def test_without_time_no_case_begins(machine: Machine) -> None:
    late = Machine(machine.device, machine.launcher, True, -1)
    for name in ("conformance", "attention", "step"):
        found = PARTS[name](late, lambda what, share: None)
        assert not found.rows
        assert any("out of time" in note for note in found.notes)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_orders_of_other_head_dims_have_eight_planes_of_each_octet(dim: int) -> None:
    for order in bench_module.ORDERS:
        made = bench_module._stretched([int(octet) for octet in order], dim)
        assert [made.count(octet) for octet in range(dim // 8)] == [8] * (dim // 8)
