"""Packing: what it costs to quantize a prompt's tokens, a group of them in decode, and to move rows alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qaq_core.base.pages import KEY
from qaq_eval.speed.gpu_check.bench import Machine, Report, Table, micros, millis, packed_tokens, rate
from qaq_eval.speed.gpu_check.model import RandomModel, shapes, with_prompt


def pack(machine: Machine, report: Report) -> Table:
    """Of each shape of model; the moves of rows for one layer of 32/8/128."""
    table = Table("Packing", ["what", "tokens", "time", "rate"])
    count = 200 if machine.emulated else 2048
    report("packing: rows to their places", None)
    packed = packed_tokens(machine, 1 if machine.emulated else 8, 128, count)
    pool, tags = packed.sides[KEY].pools[0], packed.tags
    seconds = machine.stepped(lambda: pool.narrow(tags, tags, KEY), 3)
    row = ["keys of a layer to new places, with counting, µs", str(count), micros(seconds)]
    table.rows.append([*row, rate(2 * pool.nbytes, seconds) + " GB/s" if seconds else ""])
    for shape in shapes(machine):
        if machine.left < 0:
            table.notes.append("out of time: the rest was not run")
            break
        report(f"packing: {shape.name}", None)
        model = RandomModel(machine, shape, thin=True)
        tokens = 60 if machine.emulated else 4096
        made: list[object] = []

        def whole(model: RandomModel = model, tokens: int = tokens, made: list[object] = made) -> None:
            made[:] = [with_prompt(model, tokens)]

        seconds = machine.stepped(whole, 1 if machine.emulated else 2)
        speed = rate(tokens, seconds, 1) + " tokens/s" if seconds else ""
        about = f"{shape.name}: a prompt, its rotation included, ms"
        table.rows.append([about, str(tokens), millis(seconds), speed])
        seconds = machine.stepped(_group(model, tokens), 1 if machine.emulated else 3)
        table.rows.append([f"{shape.name}: a group in decode, ms", str(model.method.pack_tokens), millis(seconds), ""])
    return table


def _group(model: RandomModel, tokens: int) -> Callable[[], None]:
    """Quantizes and packs the next group of a sequence, as decode does."""
    sequence, method = with_prompt(model, tokens), model.method
    dims = (method.shape.layers, 2, method.shape.kv_heads, method.pack_tokens, method.shape.head_dim)
    originals = torch.randn(dims).to(method.device, method.dtype)

    def group() -> None:
        packed = sequence.packed
        rows, metas, outliers = method.prepare(packed.quantizer, originals, packed.stop)
        widths = torch.full(rows[0].shape[:3], 4, dtype=torch.uint8, device=method.device)
        packed.append((widths, widths), rows, metas, outliers)

    return group
