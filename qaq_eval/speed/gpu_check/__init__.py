"""`qaq bench gpu --check`: whether the kernels work on a GPU, and how fast they are. See docs/gpu.md."""

from qaq_eval.speed.gpu_check.bench import Machine, Table
from qaq_eval.speed.gpu_check.check import PARTS, SECONDS, check

__all__ = ["PARTS", "SECONDS", "Machine", "Table", "check"]
