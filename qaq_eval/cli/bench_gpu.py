"""`qaq bench gpu`: what the compiler makes of the CUDA kernels, and what a GPU makes of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli.options import JsonPath
from services.cli.terminal import progress_line, screen

if TYPE_CHECKING:
    from qaq_eval.speed.gpu_check import Table as Found
    from qaq_eval.speed.gpu_static import Static


WIDE = 120
"""Columns that a table of results takes, also where nobody sees them yet."""


def gpu(
    static: Annotated[bool, typer.Option("--static", help="Count the compiler's code; needs nvcc, no GPU.")] = False,
    checked: Annotated[bool, typer.Option("--check", help="Check and measure on a GPU, in 8 minutes.")] = False,
    emulated: Annotated[
        bool, typer.Option("--emulated", help="With --check: on this CPU, with small shapes, for no times.")
    ] = False,
    parts: Annotated[str, typer.Option(help="Of --check, separated by commas; default: all.")] = "",
    model: Annotated[Path | None, typer.Option(help="What --check serves; default: the demo model.")] = None,
    device: Annotated[str, typer.Option(help="Of --check.")] = "cuda",
    architectures: Annotated[str, typer.Option(help="Of --static, separated by commas.")] = "sm_80,sm_86,sm_89,sm_90",
    head_dims: Annotated[str, typer.Option(help="Of --static: 64, 96, 128, 256, separated by commas.")] = "128",
    json_path: JsonPath = None,
) -> None:
    """Counts the CUDA kernels' registers, spills, shared memory and instructions (--static), or checks and times them
    on a GPU (--check). Nothing of --check has run on one yet."""
    if static == checked:
        raise typer.BadParameter("take one of --static and --check", param_hint="--static, --check")
    if checked:
        _check(parts, emulated, model, device, json_path)
    else:
        _count(architectures, head_dims, json_path)


def _check(parts: str, emulated: bool, model: Path | None, device: str, json_path: Path | None) -> None:
    """Progress first; the tables come last, and with them what failed."""
    import torch

    from qaq_core.base.errors import ConfigError
    from qaq_eval.speed.gpu_check import PARTS, check

    chosen = [name.strip() for name in parts.split(",")] if parts else list(PARTS)
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(PARTS)}", param_hint="--parts")
    if emulated:
        os.environ |= {"QAQ_EMULATE": "1", "QAQ_KERNEL": "cuda"}
        device = "cpu"
    try:
        with progress_line() as report:
            tables = check(torch.device(device), chosen, report, model)
    except ConfigError as error:
        screen.print(str(error), style="red", highlight=False)
        raise typer.Exit(1) from None
    wide = Console(width=max(screen.width, WIDE))
    for found in tables:
        wide.print(_shown(found), highlight=False)
        for note in found.notes:
            screen.print(f"  {note}", highlight=False, markup=False)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(one) for one in tables], indent=1) + "\n")
    failures = [f"{found.title}: {why}" for found in tables for why in found.failed]
    for why in failures:
        screen.print(f"FAILED {why}", style="red", highlight=False, markup=False)
    if failures:
        raise typer.Exit(1)
    screen.print("all parts have passed" + (", emulated" if emulated else ""), highlight=False)


def _shown(found: Found) -> Table:
    table = Table(title=found.title, title_justify="left")
    for i, name in enumerate(found.columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in found.rows:
        table.add_row(*map(escape, row))
    return table


def _count(architectures: str, head_dims: str, json_path: Path | None) -> None:
    from qaq_core.kernels.cuda import ARCHITECTURES, HEAD_DIMS, find_disassembler, find_nvcc
    from qaq_eval.speed.gpu_static import count_static

    kinds = [name.strip() for name in architectures.split(",")]
    if unknown := sorted(set(kinds) - set(ARCHITECTURES)):
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(ARCHITECTURES)}", param_hint="--architectures")
    dims = [int(dim) if dim.strip().isdigit() else 0 for dim in head_dims.split(",")]
    if set(dims) - set(HEAD_DIMS):
        known = ", ".join(map(str, HEAD_DIMS))
        raise typer.BadParameter(f"{head_dims!r} has something else than {known}", param_hint="--head-dims")
    nvcc = find_nvcc()
    if nvcc is None:
        raise typer.BadParameter("there is no nvcc on PATH, in QAQ_NVCC, or in the wheel nvidia-cuda-nvcc")
    try:
        with progress_line() as report:
            results = count_static(nvcc, find_disassembler(), kinds, dims, report)
    except RuntimeError as error:
        screen.print(str(error), style="red", highlight=False)
        raise typer.Exit(1) from None
    screen.print(_kernels(results), highlight=False)
    screen.print(_instructions(results), highlight=False)
    for result in results:
        if result.why is not None:
            screen.print(f"{result.architecture}: instructions are not counted, {result.why}", highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps({"nvcc": nvcc, "rows": [asdict(one) for one in results]}, indent=1) + "\n")


def _kernels(results: list[Static]) -> Table:
    table = Table("architecture", "kernel", "registers", "spilled bytes", "shared bytes")
    for result in results:
        for kernel in sorted(result.kernels, key=lambda kernel: kernel.kernel):
            numbers = (kernel.registers, kernel.spills, kernel.shared)
            table.add_row(result.architecture, kernel.kernel, *map(str, numbers))
    return table


def _instructions(results: list[Static]) -> Table:
    table = Table(title="warp instructions for 32 numbers, by bits of all rows; counted, not measured")
    widths = [bits for bits in (1.0, 2.0, 3.0, 4.0, 8.0) if any(bits in result.by_width for result in results)]
    for name in ("architecture", "head_dim", *(f"{bits:g}" for bits in widths), "SmolLM2, full tiles", "filled tiles"):
        table.add_column(name, justify="right")
    for result in results:
        if result.smollm2 is not None and result.filled is not None:
            each = (f"{result.by_width[bits]:.1f}" for bits in widths)
            mixed = (f"{result.smollm2:.2f}", f"{result.filled:.2f}")
            table.add_row(result.architecture, str(result.head_dim), *each, *mixed)
    return table
