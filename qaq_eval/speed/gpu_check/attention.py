"""Attention of a decode step of one layer: the kernels over packed tokens against dense attention in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from qaq_core.attention import STEP, StepKernels, staged
from qaq_core.storage import PackedTokens
from qaq_eval.speed.gpu_check.bench import (
    RECENT,
    SINKS,
    Machine,
    Report,
    Table,
    attention_of,
    micros,
    one_width,
    packed_tokens,
    rate,
    ratio,
)
from qaq_eval.speed.gpu_static import SHARES

SHAPES = ((32, 8, 128), (9, 3, 64))
TOKENS, BATCHES = (4096, 16384, 65536), (1, 4, 16, 64)
KINDS = {"demo's widths": SHARES, "2 bits": one_width(2.0)}
ROOM = 0.8
"""Share of free memory that one case may take."""
_PAGE = 16


def compare(machine: Machine, report: Report) -> Table:
    """All shapes, lengths and batches; what does not fit is left out."""
    columns = ["heads", "tokens", "batch", "SDPA µs", "FlashInfer µs", "widths", "QAQ µs", "GB/s", "of the best dense"]
    table = Table("Attention of a layer, bfloat16 against packed", columns)
    table.notes.append("GB/s: packed bytes over the time; the last column is below 1 where QAQ is faster")
    table.notes.append("FlashInfer: " + (_flashinfer()[1] or "its decode kernels over pages of 16 tokens"))
    shapes = (((4, 2, 128), (3, 1, 64)), (300,), (1, 2)) if machine.emulated else (SHAPES, TOKENS, BATCHES)
    for heads in shapes[0]:
        for tokens in shapes[1]:
            held = {kind: packed_tokens(machine, heads[1], heads[2], tokens, shares) for kind, shares in KINDS.items()}
            for batch in shapes[2]:
                report(f"attention: {'/'.join(map(str, heads))}, {tokens} tokens, batch {batch}", None)
                if machine.left < 0:
                    table.notes.append("out of time: the rest was not run")
                    return table
                table.rows += _case(machine, heads, tokens, batch, held)
    return table


def _case(
    machine: Machine, heads: tuple[int, int, int], tokens: int, batch: int, held: dict[str, PackedTokens]
) -> Iterator[list[str]]:
    """A row for each kind of widths."""
    named = ["/".join(map(str, heads)), str(tokens), str(batch)]
    size = 4 * batch * heads[1] * tokens * heads[2]
    if _fits(machine, 3 * size):
        dense, flash = _dense(machine, heads, tokens, batch)
        shown = [micros(dense), "" if flash is None else micros(flash)]
    else:
        dense = flash = None
        shown = ["does not fit", ""]
    best = min((seconds for seconds in (dense, flash) if seconds is not None), default=None)
    for kind, packed in held.items():
        if not _fits(machine, batch * packed.nbytes):
            yield [*named, *shown, kind, "does not fit", "", ""]
            continue
        seconds = machine.timed(packed_step(machine, heads, [packed.copy() for _ in range(batch)]))
        yield [*named, *shown, kind, micros(seconds), rate(batch * packed.nbytes, seconds), ratio(seconds, best)]


def packed_step(
    machine: Machine, heads: tuple[int, int, int], tokens: list[PackedTokens]
) -> Callable[[], torch.Tensor]:
    """A layer's launches, as a decode step makes them."""
    query_heads, kv_heads, dim = heads
    batch, device = len(tokens), machine.device
    exact = torch.randn(batch, 1, 2, kv_heads, SINKS + RECENT, dim).to(device, torch.bfloat16)
    query = torch.randn(batch, query_heads, dim).to(device, torch.bfloat16)
    added = torch.randn(2, batch, kv_heads, dim).to(device, torch.bfloat16)
    describer = attention_of(machine, tokens[0]).describer
    residents = [describer.resident(mine, rows) for mine, rows in zip(tokens, exact, strict=True)]
    steps = np.zeros(batch, STEP)
    steps["layers"] = [one.table.data_ptr() for one in residents]
    steps["sinks"], steps["exact_tokens"], steps["new_place"] = SINKS, SINKS + RECENT, SINKS + RECENT - 1
    kernels = StepKernels(
        machine.launcher,
        staged(steps, device).to(device),
        (batch, kv_heads, query_heads, dim),
        residents[0].blocks,
        torch.bfloat16,
        torch.bfloat16,
        torch.bfloat16,
    )
    layout = describer.layouts(tokens[0])[0]
    alive = tokens, exact, residents, describer

    def step() -> torch.Tensor:
        assert alive
        return kernels.layer(0, layout, dim**-0.5, None, query, (added[0], added[1]))

    return step


def _dense(machine: Machine, heads: tuple[int, int, int], tokens: int, batch: int) -> tuple[float | None, float | None]:
    """Seconds of SDPA, the faster of two ways to give it groups of heads, and of FlashInfer."""
    query_heads, kv_heads, dim = heads
    one = torch.randn(2, 1, kv_heads, tokens, dim).to(machine.device, torch.bfloat16)
    keys, values = one.repeat(1, batch, 1, 1, 1)
    query = torch.randn(batch, query_heads, 1, dim).to(machine.device, torch.bfloat16)
    grouped = query.view(batch, kv_heads, -1, dim)
    times = [
        machine.timed(lambda: sdpa(query, keys, values, enable_gqa=True)),
        machine.timed(lambda: sdpa(grouped, keys, values)),
    ]
    best = min((seconds for seconds in times if seconds is not None), default=None)
    module, _ = _flashinfer()
    flash = None if module is None else machine.timed(_paged(module, query.squeeze(2), keys, values))
    return best, flash


def _flashinfer() -> tuple[Any, str | None]:
    """The module, or why there is none."""
    try:
        import flashinfer
    except ImportError as error:
        return None, f"not run, {error}"
    return flashinfer, None


def _paged(module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """FlashInfer's decode over pages; query [batch, query_heads, dim], keys and values [batch, kv_heads, n, dim]."""
    batch, heads, tokens, dim = keys.shape
    pages = torch.stack([keys, values], 2).view(batch, heads, 2, tokens // _PAGE, _PAGE, dim)
    pages = pages.permute(0, 3, 2, 4, 1, 5).reshape(-1, 2, _PAGE, heads, dim).contiguous()
    count = tokens // _PAGE
    place: dict[str, Any] = {"dtype": torch.int32, "device": query.device}
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=query.device), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(batch + 1, **place) * count,
        torch.arange(batch * count, **place),
        torch.full((batch,), _PAGE, **place),
        query.shape[1],
        heads,
        dim,
        _PAGE,
        q_data_type=query.dtype,
        kv_data_type=keys.dtype,
    )
    return lambda: wrapper.run(query, pages)


def _fits(machine: Machine, size: int) -> bool:
    return machine.device.type != "cuda" or size < ROOM * torch.cuda.mem_get_info(machine.device)[0]
