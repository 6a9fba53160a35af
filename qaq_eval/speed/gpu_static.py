"""What the compiler makes of the CUDA kernels: registers, spills, shared memory, instructions. Nothing runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qaq_core.kernels.cuda import (
    BLOCK,
    Compiled,
    Counts,
    Profile,
    UnknownCode,
    compile_kernels,
    count,
    cubin_name,
    profile,
)

ORDERS = (
    "0010210324153064251736402751364027513647205316472563147256347567",
    "0001021342051364725063174526301745263710452637145267314526734567",
)
"""The octet of each unit of SmolLM2's rows (head_dim 64), of keys and of values."""
_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
_KEYS = (0.0868, 0.3454, 0.1159, 0.0622, 0.0576, 0.0437, 0.047, 0.0448, 0.054, 0.0502, 0.0469, 0.0287, 0.0167)
_VALUES = (0.0107, 0.2531, 0.1754, 0.0758, 0.073, 0.0609, 0.0601, 0.0403, 0.0717, 0.0699, 0.0504, 0.0313, 0.0274)
SHARES = dict(zip(_BITS, _KEYS, strict=True)), dict(zip(_BITS, _VALUES, strict=True))
"""Shares of widths, bits an element, of 4,096 tokens of this project's documents in SmolLM2 at 2.2 bits."""


@dataclass(frozen=True)
class Static:
    """What was counted for an architecture and head_dim.

    Attributes:
        counts: None without a disassembler, or where the code is arranged otherwise; `why` says which.
        by_width: warp instructions for 32 numbers where all rows have a width, by bits, tiles full.
        smollm2: the same at SmolLM2's shares of widths, tiles full. filled: with tiles as a block fills them.
    """

    architecture: str
    head_dim: int
    kernels: list[Compiled]
    counts: Counts | None = None
    why: str | None = None
    by_width: dict[float, float] = field(default_factory=dict)
    smollm2: float | None = None
    filled: float | None = None


def count_static(
    nvcc: str,
    disassembler: str | None,
    architectures: Sequence[str],
    head_dims: Sequence[int],
    report: Callable[[str, float | None], None],
) -> list[Static]:
    """Compiles kernels and counts.

    Raises:
        RuntimeError: nvcc failed.
    """
    made = []
    with tempfile.TemporaryDirectory() as name:
        for architecture in architectures:
            for head_dim in head_dims:
                report(f"{architecture}, head_dim {head_dim}", None)
                kernels = compile_kernels(nvcc, architecture, head_dim, Path(name))
                path = Path(name) / cubin_name(architecture, head_dim)
                made.append(_counted(Static(architecture, head_dim, kernels), path, disassembler))
    return made


def rows_of(shares: Sequence[dict[float, float]], head_dim: int, block: int | None = None) -> tuple[Profile, Profile]:
    """Rows of these shares with SmolLM2's orders."""
    keys, values = (
        profile([int(octet) for octet in order], mine, head_dim, block)
        for order, mine in zip(ORDERS, shares, strict=True)
    )
    return keys, values


def _counted(plain: Static, path: Path, disassembler: str | None) -> Static:
    about = plain.architecture, plain.head_dim, plain.kernels
    if disassembler is None:
        return Static(*about, why="no cuobjdump on PATH or in Triton's wheel")
    try:
        counts = count(path, plain.head_dim, disassembler)
    except UnknownCode as error:
        return Static(*about, why=f"the code is arranged otherwise: {error}")
    dim = plain.head_dim
    by_width = {bits: counts.per_number(rows_of([{bits: 1.0}] * 2, dim)) for bits in SHARES[0] if bits}
    return Static(
        *about,
        counts=counts,
        by_width=by_width,
        smollm2=counts.per_number(rows_of(SHARES, dim)),
        filled=counts.per_number(rows_of(SHARES, dim, BLOCK)),
    )
