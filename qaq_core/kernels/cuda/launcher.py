"""What runs CUDA kernels: a GPU's driver, or a CPU that pretends to be one."""

from __future__ import annotations

import ctypes
from typing import Protocol


class Launcher(Protocol):
    """Runs kernels.

    Attributes:
        block: packed tokens of a block. threads: of a block of `split`.
    """

    name: str
    block: int
    threads: int

    def launch(
        self, kernel: str, head_dim: int, grid: tuple[int, int, int], threads: int, args: ctypes.Structure
    ) -> None:
        """Puts a kernel behind what torch was asked for before; `args` has been read when this returns."""
        ...
