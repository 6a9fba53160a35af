"""The report: one HTML page that needs nothing else, with plots and all figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING

from qaq_eval.quality import plots
from qaq_eval.quality.record import Part, Row

if TYPE_CHECKING:
    from qaq_eval.quality.turns import TurnRow

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem}
svg{max-width:100%;height:auto}table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}"""


def text_page(about: Mapping[str, object], rows: Sequence[Row], parts: Sequence[Part]) -> str:
    """Losses against compression, where the bits are, exceptions, and the rows."""
    return _page(about, [("Loss against compression", plots.losses(rows)), *_inside(rows, parts)], rows)


def turns_page(about: Mapping[str, object], rows: Sequence[TurnRow], last: Sequence[Part]) -> str:
    """Losses by turn; bits and exceptions of the last turn's parts; the rows."""
    return _page(about, [("Loss by turn", plots.turns(rows)), *_inside(rows, last)], rows)


def _inside(rows: Sequence[Row], parts: Sequence[Part]) -> list[tuple[str, str]]:
    configs = list(dict.fromkeys(row.config for row in rows))
    found = [(f"Bits of {config} at the end", plots.bits(parts, config)) for config in configs]
    found.append(("Exceptions", plots.exceptions(parts, configs)))
    return [(title, plot) for title, plot in found if plot is not None]


def _page(about: Mapping[str, object], drawn: Sequence[tuple[str, str]], rows: Sequence[Row]) -> str:
    facts = "".join(f"<li>{escape(name)}: {escape(str(value))}</li>" for name, value in about.items())
    body = "".join(f"<h2>{escape(title)}</h2>{plot}" for title, plot in drawn)
    told = [asdict(row) for row in rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in told[0])
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row.values())}</tr>" for row in told)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>qaq eval</title><style>{_STYLE}</style>"
        f"<h1>Against full precision</h1><ul>{facts}</ul>{body}"
        f"<h2>Figures</h2><table><tr>{head}</tr>{lines}</table></html>\n"
    )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape("" if value is None else str(value))
