"""What the machine is, and its ceilings: how fast it copies, and what a launch costs."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from qaq_core.kernels.cuda import architecture_for, find_nvcc
from qaq_eval.speed.gpu_check.bench import Machine, Report, Table, micros, rate

COPIED = 2 << 30
ASKED = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
PACKAGES = ("qaq-kv", "torch", "triton", "transformers", "flashinfer-python")


def look(machine: Machine, report: Report) -> Table:
    """Versions and ceilings."""
    report("versions and ceilings", None)
    table = Table("The machine", ["what", "found"])
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        table.rows.append([name, found])
    table.rows.append(["Python", platform.python_version()])
    table.rows.append(["nvcc", find_nvcc() or "none"])
    if machine.emulated:
        table.rows.append(["device", f"none: emulated on a CPU, blocks of {machine.launcher.block} tokens"])
    else:
        _gpu(machine, table)
    _copies(machine, table)
    _launches(machine, table)
    return table


def _gpu(machine: Machine, table: Table) -> None:
    about = torch.cuda.get_device_properties(machine.device)
    capability = (about.major, about.minor)
    table.rows += [
        [
            "device",
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} SMs",
        ],
        ["compute capability", f"{about.major}.{about.minor}, kernels of {architecture_for(capability)}"],
        ["CUDA of torch", str(torch.version.cuda)],
    ]
    asked = ["nvidia-smi", "--format=csv,noheader", f"--query-gpu={','.join(ASKED)}"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = f"nvidia-smi does not say: {error}"
    table.rows.append(["driver, clocks, power", said])


def _copies(machine: Machine, table: Table) -> None:
    size = 1 << 20 if machine.emulated else COPIED
    source = torch.ones(size, dtype=torch.uint8, device=machine.device)
    into = torch.empty_like(source)
    seconds = machine.timed(lambda: into.copy_(source))
    if not torch.equal(into, source):
        table.failed.append("a copy on the device has other bytes")
    table.rows.append(["reads and writes of a copy, GB/s", rate(2 * size, seconds) or "emulated"])
    summed = source.view(torch.float32)
    table.rows.append(["reads of a sum, GB/s", rate(size, machine.timed(summed.sum)) or "emulated"])
    if not machine.emulated:
        host = torch.empty(size // 8, dtype=torch.uint8, pin_memory=True)
        seconds = machine.stepped(lambda: host.copy_(source[: size // 8], non_blocking=True), 5)
        table.rows.append(["from the device to pinned memory, GB/s", rate(size // 8, seconds)])


def _launches(machine: Machine, table: Table) -> None:
    """What a tiny kernel costs on the stream and in a graph."""
    one, count = torch.zeros(1, device=machine.device), 10 if machine.emulated else 1000

    def launches() -> None:
        for _ in range(count):
            one.add_(1.0)

    graphed = machine.timed(launches)
    on_stream = machine.stepped(launches, 3)
    table.rows.append(["a launch of torch's on the stream, µs", micros(on_stream and on_stream / count)])
    table.rows.append(["a node of a graph, µs", micros(graphed and graphed / count)])
