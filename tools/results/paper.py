"""The tables in docs/paper.md: what `qaq paper` measured, for both models."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tools.results.runs import Json, Runs
from tools.results.tables import loss, model_name, table

BITS = range(1, 9)


def section(measured: Sequence[Runs]) -> str:
    """Raises ValueError on an experiment that no table shows."""
    by_name: dict[str, dict[str, Json]] = {"fig2a": {}, "table2": {}, "table3": {}}
    for runs in reversed(measured):  # SmolLM2 first
        if runs.first["experiment"] not in by_name:
            raise ValueError(f"no table shows {runs.source}")
        by_name[runs.first["experiment"]][model_name(runs.first)] = runs.first
    some = measured[0].first
    about = (
        f"{some['documents']} documents of {some['text']}, {some['contexts'][0]:,} tokens each and {some['decode']} "
        "decoded, so small differences mean nothing. ± is the standard error over documents. Compression counts every "
        "resident byte. Commands, commits and machine: [results/paper](results/paper)."
    )
    return f"""
{textwrap.fill(about, 120, break_on_hyphens=False)}

Keys against values (`fig2a`): KL with one side at b bits and the other at 16, uniform codes per head.

{_sides(by_name["fig2a"])}

Quantizing against evicting (`table2`), at the same bytes. `paper` cannot follow to 6x and 8x: it holds at least one
bit per value, its outliers and its attention windows.

{_configs(by_name["table2"])}

What each part of the paper's method is worth (`table3`).

{_configs(by_name["table3"])}

"""


def _sides(models: dict[str, Json]) -> str:
    rows = []
    for model, result in models.items():
        kl = {row["config"]: f"{row['kl_mean']:.4f}" for row in result["rows"]}
        rows.append([f"{model}, keys", *(kl[f"k{bits}v16"] for bits in BITS)])
        rows.append([f"{model}, values", *(kl[f"k16v{bits}"] for bits in BITS)])
    return table(["bits", *map(str, BITS)], rows)


def _configs(models: dict[str, Json]) -> str:
    head = ["config", *(f"{model}: {what}" for model in models for what in ("compression", "KL", "ΔNLL"))]
    by_config = zip(*(result["rows"] for result in models.values()), strict=True)
    return table(
        head, ([f"`{rows[0]['config']}`", *(cell for row in rows for cell in _cells(row))] for rows in by_config)
    )


def _cells(row: Json) -> tuple[str, str, str]:
    return f"{row['compression']:.2f}x", f"{row['kl_mean']:.4f}", loss(row)
