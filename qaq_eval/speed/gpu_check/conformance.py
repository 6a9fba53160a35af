"""Whether the kernels compute on the device what the reference does on a CPU, and whether rows are the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qaq_core.allocation import StepObserver
from qaq_core.attention import LayerTokens, ReferenceAttention
from qaq_core.base.pages import KEY, VALUE
from qaq_core.kernels.cuda import CudaWeaver, cuda_encoders
from qaq_core.quantization import Rotation, torch_encoder
from qaq_core.storage import PackedTokens
from qaq_eval.speed.gpu_check.bench import (
    RECENT,
    SINKS,
    Machine,
    Report,
    Table,
    attention_of,
    drawn,
    one_width,
    quantizer,
)
from qaq_eval.speed.gpu_static import SHARES

MOST = 2e-3
"""Relative error of an output or a statistic."""


@dataclass(frozen=True)
class Case:
    """A decode step of one layer.

    Attributes:
        bits: of all rows; None for the demo model's widths.
    """

    dim: int
    heads: int
    group: int
    tokens: int
    bits: float | None = None
    window: int | None = None
    dtype: torch.dtype = torch.float16
    batch: int = 1

    def __str__(self) -> str:
        kind = "demo's widths" if self.bits is None else f"{self.bits:g} bits"
        extra = [f"window {self.window}"] if self.window else []
        extra += [f"batch {self.batch}"] if self.batch > 1 else []
        name = str(self.dtype).removeprefix("torch.")
        heads = f"{self.heads * self.group}/{self.heads}/{self.dim}"
        return ", ".join([heads, f"{self.tokens} tokens", kind, name, *extra])


def cases(emulated: bool) -> Iterator[Case]:
    """Head_dims, groups, widths, lengths at the borders of tiles and blocks, windows, types, batches."""
    plain = Case(64, 3, 3, 200 if emulated else 2500)
    yield plain
    if emulated:
        yield Case(128, 1, 4, 150, dtype=torch.bfloat16)
        yield replace(plain, bits=2.0, window=60, batch=2)
        return
    yield from (Case(dim, 2, 4, 1500) for dim in (96, 128, 256))
    yield from (Case(128, 2, group, 700) for group in (1, 5, 8, 16))
    yield from (replace(plain, bits=bits) for bits in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 16.0))
    yield from (Case(128, 1, 4, tokens) for tokens in (1, 31, 33, 1023, 1024, 1025, 4100))
    yield from (replace(plain, window=window) for window in (1, 40, 1500))
    yield from (replace(plain, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    yield Case(128, 8, 4, 3000, batch=4)


def conform(machine: Machine, report: Report) -> Table:
    """All cases."""
    table = Table("Conformance: relative errors to the reference on a CPU", ["case", "output", "statistic", "rows"])
    table.notes.append(f"an error above {MOST:g}, or a row of other bytes, has failed")
    every = list(cases(machine.emulated))
    for i, case in enumerate(every):
        report(f"conformance: {case}", i / len(every))
        if machine.left < 0:
            table.notes.append(f"out of time: {len(every) - i} cases were not run")
            break
        output, statistic, rows = _run(machine, case)
        table.rows.append([str(case), f"{output:.1e}", f"{statistic:.1e}", "the same" if rows else "OTHERS"])
        if not (output < MOST and statistic < MOST and rows):
            table.failed.append(f"{case} is not what the reference computes")
    return table


def _run(machine: Machine, case: Case) -> tuple[float, float, bool]:
    """Errors of output and statistic, and whether all rows are the same."""
    device, cpu = machine.device, torch.device("cpu")
    here = [_tokens(machine, case, seed) for seed in range(case.batch)]
    exact = [_normal(7 + seed, 2, case.heads, SINKS + RECENT, case.dim).to(case.dtype) for seed in range(case.batch)]
    query = _normal(3, case.batch, case.heads * case.group, 1, case.dim)
    length = SINKS + case.tokens + RECENT
    seen = torch.zeros(2, case.batch, case.heads, length)
    kernels = attention_of(machine, here[0][1])
    there = seen[0].to(device)
    layers = [
        LayerTokens(0, part[KEY].to(device), part[VALUE].to(device), SINKS, tiled)
        for part, (_, tiled) in zip(exact, here, strict=True)
    ]
    observers = [StepObserver("mean_square", into) for into in there]
    got = kernels.batch(query.to(device), layers, 0.1, case.window, observers).cpu()
    if kernels.fallbacks:
        raise RuntimeError(f"the reference ran instead of the kernels: {dict(kernels.fallbacks)}")
    reference = ReferenceAttention(here[0][0].quantizer.codec, cpu)
    expected = []
    for i, (by_width, _) in enumerate(here):
        tokens = LayerTokens(0, exact[i][KEY], exact[i][VALUE], SINKS, by_width)
        expected.append(reference(query[i], tokens, 0.1, case.window, StepObserver("mean_square", seen[1, i])))
    same = all(_same_rows(by_width, tiled) for by_width, tiled in here)
    return _relative(got, torch.stack(expected)), _relative(there.cpu(), seen[1]), same


def _tokens(machine: Machine, case: Case, seed: int) -> tuple[PackedTokens, PackedTokens]:
    """The same tokens by width on a CPU, and in tiles on the device: rotated and encoded there, in two parts."""
    shape, shares = (1, case.heads, case.dim), SHARES if case.bits is None else one_width(case.bits)
    widths = drawn(shares, (1, case.heads, case.tokens), seed)
    numbers = _normal(seed, 2, 1, case.heads, case.tokens, case.dim)
    made = []
    for device, weaver in ((torch.device("cpu"), None), (machine.device, CudaWeaver(machine.launcher))):
        own = quantizer(case.heads, case.dim, device).rotated(_rotations(case, device))
        if weaver is not None:
            own = own.using(cuda_encoders(machine.launcher, machine.device, torch_encoder))
        packed = PackedTokens(own, shape, SINKS, device, weaver)
        for part in (slice(0, case.tokens * 2 // 3), slice(case.tokens * 2 // 3, case.tokens)):
            mine = [own.rows(side, numbers[side][:, :, part].to(device), SINKS + part.start) for side in (KEY, VALUE)]
            if mine[0].shape[2]:
                metas = [own.meta(row) for row in mine]
                chosen = [width[:, :, part].to(device) for width in widths]
                packed.append((chosen[0], chosen[1]), (mine[0], mine[1]), (metas[0], metas[1]), (None, None))
        made.append(packed)
    return made[0], made[1]


def _rotations(case: Case, device: torch.device) -> tuple[Rotation, Rotation]:
    """Of keys and values; of random reflections."""
    generator = torch.Generator().manual_seed(case.dim)
    size, octets = case.dim * (case.dim + 1) // 2 - 1, (1, case.heads, case.dim // 8)
    made = []
    for _ in (KEY, VALUE):
        vectors = torch.randint(-127, 128, (1, case.heads, size), generator=generator, dtype=torch.int8)
        before, after = 0.5 + torch.rand(2, *octets, generator=generator)
        made.append(Rotation(vectors, before, after).to(device))
    return made[0], made[1]


def _same_rows(by_width: PackedTokens, tiled: PackedTokens) -> bool:
    for side in (KEY, VALUE):
        for block, pools in enumerate(zip(by_width.sides[side].pools, tiled.sides[side].pools, strict=True)):
            first, last = by_width.block_range(block)
            here, there = (
                pool.of_layer(packed.tags[0, :, first:last], side, 0)
                for pool, packed in zip(pools, (by_width, tiled), strict=True)
            )
            held = {width: rows for width, rows in here.items() if len(rows)}
            if held.keys() != there.keys():
                return False
            if not all(torch.equal(rows, there[width].cpu()) for width, rows in held.items()):
                return False
    return True


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
