"""`qaq bench store`: what originals take at rest, and what compressing them costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.cli.options import JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen, size

if TYPE_CHECKING:
    import torch

    from qaq_eval.speed.store_calls import CallSpeed


def store(
    model: Model = None,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of the text; whole pages of 32 are used.")] = 512,
    text: Annotated[Path | None, typer.Option(help="Text; default: the built-in one.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Pages of each form that are timed.")] = 15,
    calls: Annotated[
        int, typer.Option(min=0, help="Calls of each kind to a cache service over Redis; 0 measures none.")
    ] = 128,
    page_form: Annotated[str, typer.Option(help="How that cache service stores pages.")] = "plain",
    json_path: JsonPath = None,
) -> None:
    """Packs a text's keys and values as a cache service does: bytes, and processor time of puts and reads. Then times
    calls to a cache service of its own: Put, Fetch, and rows that are quantized again.

    The model computes in its own dtype; its values are then taken as float32, bfloat16 and float16.
    """
    import torch

    from qaq_core.base.errors import ConfigError
    from qaq_core.base.pages import PAGE_TOKENS
    from qaq_core.models import load_model
    from qaq_eval.quality import builtin_text
    from qaq_eval.speed.store import keys_and_values, store_speed

    with progress_line() as report:
        loaded = load_model(model_or_default(model), progress=lambda stage, share: report(stage, None))
        content = builtin_text() if text is None else text.read_text(encoding="utf-8")
        ids = loaded.tokenizer(content, return_tensors="pt").input_ids[:, :tokens]
        if ids.shape[1] < tokens:
            raise ConfigError(f"the text has {ids.shape[1]} tokens; take fewer --tokens or a longer --text")
        values = keys_and_values(loaded.model, ids)
        rows = store_speed(values, [torch.float32, torch.bfloat16, torch.float16], repeat, report)
        called = _calls(values[:, :, :, :PAGE_TOKENS].contiguous(), calls, page_form, report) if calls else []
    table = Table("dtype", "form", "page", "of plain", "put", "page read", "row read", "bytes read", "error")
    for row in rows:
        table.add_row(
            row.dtype,
            row.form,
            size(row.page_bytes),
            f"{row.ratio:.3f}",
            f"{row.put_ms:.2f} ms",
            f"{row.page_ms:.2f} ms",
            f"{row.row_us:.1f} µs",
            f"{row.read_bytes:.0f}",
            f"{row.error:.1e}",
        )
    screen.print(table, highlight=False)
    if called:
        timed = Table("call", "bytes", "calls", "median", "99%")
        for call in called:
            figures = f"{call.p50_ms:.2f} ms", f"{call.p99_ms:.2f} ms"
            timed.add_row(call.call, size(call.nbytes), str(call.calls), *figures)
        screen.print(timed, highlight=False)
    if json_path is not None:
        about = {"model": loaded.name, "tokens": tokens, "page_form": page_form}
        parts = {"rows": [asdict(row) for row in rows], "calls": [asdict(call) for call in called]}
        json_path.write_text(json.dumps({**about, **parts}, indent=1) + "\n")


def _calls(
    values: torch.Tensor, calls: int, page_form: str, report: Callable[[str, float | None], None]
) -> list[CallSpeed]:
    """Of pages with these keys and values.

    Raises:
        ConfigError: there is no such form.
    """
    from qaq_core.base.errors import ConfigError
    from qaq_eval.speed.store import FORMS
    from qaq_eval.speed.store_calls import call_speed, made_pages, running_service
    from services.originals.client import RemoteOriginals

    if page_form not in FORMS:
        raise ConfigError(f"unknown form {page_form!r}; take {', '.join(FORMS)}")
    with running_service(page_form) as (url, secret):
        client = RemoteOriginals.registered(url, secret=secret)
        try:
            return call_speed(url, client, made_pages(values, calls), calls, report)
        finally:
            client.close()
