"""What the parts of the check share: the device, tables, times, and packed tokens of a model's widths."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from qaq_core.attention import CudaAttention
from qaq_core.kernels.cuda import CudaWeaver, Launcher
from qaq_core.quantization import LinearTransform, ProgressiveCodec, Quantizer
from qaq_core.storage import PackedTokens
from qaq_eval.speed.gpu_static import ORDERS, SHARES

SINKS, RECENT = 4, 12
FLUSHED = 256 << 20
"""Bytes that are written before each timed call: more than a GPU's cache."""
Report = Callable[[str, float | None], None]


@dataclass
class Table:
    """What a part of the check found.

    Attributes:
        failed: what is wrong, one sentence each; empty if all is as it has to be.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Machine:
    """Where the check runs.

    Args:
        launcher: runs the kernels.
        emulated: this is a CPU, whose times say nothing and are not taken; shapes are small.
        seconds: for all parts together.
    """

    def __init__(self, device: torch.device, launcher: Launcher, emulated: bool, seconds: float) -> None:
        self.device, self.launcher, self.emulated = device, launcher, emulated
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, call: Callable[[], Any], repeat: int = 11) -> float | None:
        """Median seconds of a call on the device, as the node of a graph, so without the host; None in emulation.

        The cache is flushed before each.
        """
        call()
        if self.emulated:
            return None
        for _ in range(2):
            call()
        self.sync()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        flush = torch.empty(FLUSHED, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(repeat):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return median(times)

    def stepped(self, call: Callable[[], Any], steps: int) -> float | None:
        """Median seconds of a call with all that the host does for it; None in emulation."""
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            call()
            self.sync()
            times.append(time.perf_counter() - begin)
        return None if self.emulated else median(times)


def micros(seconds: float | None) -> str:
    return "emulated" if seconds is None else f"{seconds * 1e6:.1f}"


def millis(seconds: float | None) -> str:
    return "emulated" if seconds is None else f"{seconds * 1e3:.2f}"


def ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or other is None else f"{one / other:.2f}"


def rate(count: float, seconds: float | None, unit: float = 1e9) -> str:
    return "" if seconds is None else f"{count / seconds / unit:,.0f}"


def quantizer(heads: int, dim: int, device: torch.device) -> Quantizer:
    """One of a single layer: identity matrices, random means, and the demo model's order of planes."""
    eye = torch.eye(dim, device=device).expand(1, heads, dim, dim)
    pairs = torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim // 2)
    means = torch.randn(2, 1, heads, dim, generator=torch.Generator().manual_seed(dim)).to(device)
    transform = LinearTransform(
        key_matrix=eye.clone(),
        value_matrix=eye.clone(),
        key_mean=means[0],
        value_mean=means[1],
        frequencies=(10_000.0**-pairs).unsqueeze(0),
        kind=torch.zeros(1, dtype=torch.long, device=device),
    )
    orders = [_stretched([int(octet) for octet in order], dim) for order in ORDERS]
    return Quantizer(transform, ProgressiveCodec(orders))


def _stretched(order: list[int], dim: int) -> list[int]:
    """The order of head_dim 64 for another: an octet's units are those of several."""
    octets = dim // 8
    shares = [octet * octets // 8 for octet in range(9)]
    found = [mine for octet in order for mine in range(shares[octet], shares[octet + 1])]
    missing = [octet for octet in range(octets) for _ in range(8 - found.count(octet))]
    return (found + missing)[:dim]


def drawn(
    shares: tuple[dict[float, float], dict[float, float]], shape: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Widths of keys and values, uint8, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for mine in shares:
        borders = torch.tensor(list(mine.values())).cumsum(0)[:-1]
        widths = torch.tensor([int(2 * bits) for bits in mine], dtype=torch.uint8)
        made.append(widths[torch.bucketize(torch.rand(shape, generator=generator), borders)])
    return made[0], made[1]


def one_width(bits: float) -> tuple[dict[float, float], dict[float, float]]:
    return {bits: 1.0}, {bits: 1.0}


def packed_tokens(
    machine: Machine,
    heads: int,
    dim: int,
    count: int,
    shares: tuple[dict[float, float], dict[float, float]] = SHARES,
    chunk: int = 8192,
) -> PackedTokens:
    """Random tokens of one layer, in tiles on the device."""
    made = quantizer(heads, dim, machine.device)
    packed = PackedTokens(made, (1, heads, dim), SINKS, machine.device, CudaWeaver(machine.launcher))
    for first in range(0, count, chunk):
        more = min(chunk, count - first)
        widths = [part.to(machine.device) for part in drawn(shares, (1, heads, more), first + count)]
        numbers = torch.randn(2, 1, heads, more, dim, generator=torch.Generator().manual_seed(first + dim))
        rows = [made.rows(side, part.to(machine.device), SINKS + first) for side, part in enumerate(numbers)]
        metas = [made.meta(row) for row in rows]
        packed.append((widths[0], widths[1]), (rows[0], rows[1]), (metas[0], metas[1]), (None, None))
    return packed


def attention_of(machine: Machine, packed: PackedTokens) -> CudaAttention:
    """The kernels for such rows."""
    return CudaAttention(packed.quantizer.codec, machine.device, machine.launcher)
