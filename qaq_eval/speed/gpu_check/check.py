"""All parts of the check, one after the other; what fails is in a part's table, and the others go on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qaq_core.attention import cuda_launcher
from qaq_eval.speed.gpu_check.attention import compare
from qaq_eval.speed.gpu_check.bench import Machine, Report, Table
from qaq_eval.speed.gpu_check.conformance import conform
from qaq_eval.speed.gpu_check.machine import look
from qaq_eval.speed.gpu_check.packing import pack
from qaq_eval.speed.gpu_check.served import serve
from qaq_eval.speed.gpu_check.step import step

SECONDS = 360
"""After which no part begins another case, so that all is done in 8 minutes."""
PARTS: dict[str, Callable[[Machine, Report], Table]] = {
    "machine": look,
    "conformance": conform,
    "served": serve,
    "attention": compare,
    "packing": pack,
    "step": step,
}
"""In the order in which they run: first what shows whether it works."""


def check(
    device: torch.device, parts: Sequence[str], report: Report, model: Path | None = None, seconds: float = SECONDS
) -> list[Table]:
    """Runs parts.

    Args:
        device: a CUDA device, or a CPU with QAQ_EMULATE=1.
        model: that is served; the demo model if not given.
    Raises:
        ConfigError: the kernels cannot run on the device.
    """
    machine = Machine(device, cuda_launcher(device), device.type == "cpu", seconds)
    tables = []
    for name in parts:
        try:
            tables.append(serve(machine, report, model) if name == "served" else PARTS[name](machine, report))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            tables.append(Table(name, ["what"], failed=[said]))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return tables
