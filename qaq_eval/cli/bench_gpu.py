"""`qaq bench gpu --static`: what the compiler makes of the CUDA kernels."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.cli.options import JsonPath
from services.cli.terminal import progress_line, screen

if TYPE_CHECKING:
    from qaq_eval.speed.gpu_static import Static


def gpu(
    static: Annotated[bool, typer.Option("--static", help="Count, instead of measuring: all there is.")] = False,
    architectures: Annotated[str, typer.Option(help="Separated by commas.")] = "sm_80,sm_86,sm_89,sm_90",
    head_dims: Annotated[str, typer.Option(help="64, 96, 128, 256, separated by commas.")] = "128",
    json_path: JsonPath = None,
) -> None:
    """Compiles the CUDA kernels and counts registers, spills, shared memory and instructions. Needs nvcc, no GPU."""
    from qaq_core.kernels.cuda import ARCHITECTURES, HEAD_DIMS, find_disassembler, find_nvcc
    from qaq_eval.speed.gpu_static import count_static

    if not static:
        raise typer.BadParameter("only --static is there: the kernels have never run on a GPU", param_hint="--static")
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
