"""The report: one self-contained HTML page with plots and all results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING

from qaq_eval.quality import plots
from qaq_eval.quality.record import DocumentResult, EvalResult

if TYPE_CHECKING:
    from qaq_eval.quality.long import PositionResult
    from qaq_eval.quality.turns import TurnResult

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem}
svg{max-width:100%;height:auto}table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}"""


def text_report(about: Mapping[str, object], results: Sequence[EvalResult], documents: Sequence[DocumentResult]) -> str:
    """Loss against compression, bits by layer and position, exceptions, and the table of results."""
    plot = ("Loss against compression", plots.losses(results))
    return _page(about, [plot, *_document_plots(results, documents)], results)


def turns_report(
    about: Mapping[str, object], results: Sequence[TurnResult], last_turn: Sequence[DocumentResult]
) -> str:
    """Loss by turn, bits and exceptions of the last turn, and the table of results."""
    plot = ("Loss by turn", plots.turns(results))
    return _page(about, [plot, *_document_plots(results, last_turn)], results)


def long_report(
    about: Mapping[str, object],
    results: Sequence[EvalResult],
    positions: Sequence[PositionResult],
    documents: Sequence[DocumentResult],
) -> str:
    """Loss along the answers, bits and exceptions, and the tables of positions and results."""
    plot = ("Loss along the answer", plots.positions(positions))
    sections = [plot, ("By position", _table(positions)), *_document_plots(results, documents)]
    return _page(about, sections, results)


def _document_plots(results: Sequence[EvalResult], documents: Sequence[DocumentResult]) -> list[tuple[str, str]]:
    configs = list(dict.fromkeys(result.config for result in results))
    drawn = [(f"Bits of {config} at the end", plots.bits(documents, config)) for config in configs]
    drawn.append(("Exceptions", plots.exceptions(documents, configs)))
    return [(title, plot) for title, plot in drawn if plot is not None]


def _page(about: Mapping[str, object], sections: Sequence[tuple[str, str]], results: Sequence[EvalResult]) -> str:
    facts = "".join(f"<li>{escape(name)}: {escape(str(value))}</li>" for name, value in about.items())
    body = "".join(f"<h2>{escape(title)}</h2>{plot}" for title, plot in sections)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>qaq eval</title><style>{_STYLE}</style>"
        f"<h1>Against full precision</h1><ul>{facts}</ul>{body}"
        f"<h2>Results</h2>{_table(results)}</html>\n"
    )


def _table(results: Sequence[EvalResult | PositionResult]) -> str:
    rows = [asdict(result) for result in results]
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row.values())}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape("" if value is None else str(value))
