"""The report: one self-contained HTML page that says what was compared, how it came out, and what that means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING

from qaq_eval.quality import plots, words
from qaq_eval.quality.long import summarize_positions
from qaq_eval.quality.record import DocumentResult, EvalResult

if TYPE_CHECKING:
    from qaq_eval.quality.long import PositionResult
    from qaq_eval.quality.turns import TurnResult

SESSIONS = (1, 10, 100, 1000)
"""Numbers of sessions whose bytes are told."""

_STYLE = """:root{color-scheme:light dark;--line:#8884;--dim:#8888;--mark:#2a7de1}
body{font:15px/1.55 system-ui,sans-serif;margin:2.5rem auto;max-width:64rem;padding:0 1.2rem}
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.2rem 0 .5rem}
p,li{max-width:46rem}.lead{opacity:.75;margin-top:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;font-size:13px}dt{opacity:.65}dd{margin:0}
code,dd{overflow-wrap:anywhere}code{font:12.5px/1.5 ui-monospace,monospace}
svg{max-width:100%;height:auto}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;vertical-align:top;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600}th:first-child,td:first-child{text-align:left}
tr.best td:first-child{border-left:3px solid var(--mark)}td small{opacity:.65}
details{margin:1rem 0}summary{cursor:pointer}
@media print{details{display:none}}"""

_COLUMNS = (
    "configuration",
    "% of fp16",
    "smaller",
    "bits K / V",
    "KL mean",
    "median",
    "p99",
    "largest",
    "ΔNLL",
    "top-1 agrees",
    "fetched / token",
)

Section = tuple[str, str]
"""Title and HTML."""


def text_report(
    about: Mapping[str, object],
    results: Sequence[EvalResult],
    documents: Sequence[DocumentResult],
    facts: Mapping[str, str] | None = None,
) -> str:
    """A page of texts: loss over bytes, along the answer, tails, what it saves."""
    configs = list(dict.fromkeys(result.config for result in results))
    plots_of_all: list[Section] = [("KL over bytes", plots.losses(results))]
    if min(len(document.kl) for document in documents) >= 2:
        along = [part for config in configs for part in summarize_positions(documents, config)]
        plots_of_all.append(("KL by position", plots.positions(along)))
    plots_of_all.append(("Tails", plots.tails(documents, configs)))
    return _page(about, facts, results, documents, plots_of_all)


def turns_report(
    about: Mapping[str, object],
    results: Sequence[TurnResult],
    last_turn: Sequence[DocumentResult],
    facts: Mapping[str, str] | None = None,
) -> str:
    """A page of sessions: the figures are those of the last turn, and the loss is drawn by turn."""
    last = max(result.turn for result in results)
    configs = list(dict.fromkeys(result.config for result in results))
    sections: list[Section] = [
        ("Loss by turn", plots.turns(results)),
        ("Tails of the last turn", plots.tails(last_turn, configs)),
    ]
    rest = [("Every turn", _raw(results))]
    at_end = [result for result in results if result.turn == last]
    return _page(about, facts, at_end, last_turn, sections, rest)


def long_report(
    about: Mapping[str, object],
    results: Sequence[EvalResult],
    positions: Sequence[PositionResult],
    documents: Sequence[DocumentResult],
    facts: Mapping[str, str] | None = None,
) -> str:
    """A page of long answers: as that of texts, with the table of positions."""
    configs = list(dict.fromkeys(result.config for result in results))
    sections: list[Section] = [
        ("KL over bytes", plots.losses(results)),
        ("Loss along the answer", plots.positions(positions)),
        ("Tails", plots.tails(documents, configs)),
    ]
    return _page(about, facts, results, documents, sections, [("By position", _raw(positions))])


def _page(
    about: Mapping[str, object],
    facts: Mapping[str, str] | None,
    results: Sequence[EvalResult],
    documents: Sequence[DocumentResult],
    sections: Sequence[Section],
    rest: Sequence[Section] = (),
) -> str:
    configs = list(dict.fromkeys(result.config for result in results))
    model, text = str(about.get("model", "")), str(about.get("text", ""))
    title = f"{model}: {len(results)} cache{'s' if len(results) > 1 else ''} against full precision"
    shown = [
        ("In words", _words(results)),
        ("Figures", _figures(results)),
        *sections,
        ("What it saves", _savings(documents, configs)),
    ]
    folded = [*_document_plots(documents, configs), *rest, ("Every figure", _raw(results))]
    body = "".join(f"<h2>{escape(name)}</h2>{html}" for name, html in shown)
    body += "".join(f"<details><summary>{escape(name)}</summary>{html}</details>" for name, html in folded)
    lead = (
        f"Each cache got the same {results[0].tokens:,} tokens of {escape(text)} as the model in full precision, after "
        f"prompts of {results[0].context:,} tokens. KL and NLL are in nats a token; every allocated byte of a cache is "
        "counted."
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><meta name='color-scheme' content='light dark'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<p class='lead'>{lead}</p>{body}<h2>How it was measured</h2>{_facts({**about, **(facts or {})})}</html>\n"
    )


def _words(results: Sequence[EvalResult]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in words.summary(results))
    each = "".join(f"<li><b>{escape(result.config)}</b>: {escape(words.verdict(result))}</li>" for result in results)
    limits = (
        "These are distances from the same model in full precision, on this text. Another model or text has others; "
        "a document is one sample, and ± is the standard error over documents (over tokens, if there is one)."
    )
    return f"<ul>{lines}</ul><ul>{each}</ul><p>{limits}</p>"


def _figures(results: Sequence[EvalResult]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in _COLUMNS)
    rows = []
    for result in results:
        best = "" if words.beaten_by(result, results) else " class='best'"
        cells = (
            escape(result.config),
            f"{1 / result.compression:.1%}",
            f"{result.compression:.2f}x",
            f"{result.bits_key:.1f} / {result.bits_value:.1f}",
            _with_error(result.kl_mean, result.kl_mean_se, 4),
            _with_error(result.kl_median, result.kl_median_se, 4),
            _with_error(result.kl_p99, result.kl_p99_se, 3),
            _with_error(result.kl_max, result.kl_max_se, 2),
            _with_error(result.delta_nll, result.delta_nll_se, 4, sign="+"),
            f"{result.top1_agreement:.1%}",
            f"{result.requantize_bytes_per_token:,.0f} B",
        )
        rows.append(f"<tr{best}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    note = "<p>A bar at the left: no other configuration has both fewer bytes and a smaller mean KL.</p>"
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(rows)}</table></div>{note}"


def _with_error(value: float, error: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}<br><small>± {error:.{digits}f}</small>"


def _savings(documents: Sequence[DocumentResult], configs: Sequence[str]) -> str:
    """Bytes of sessions as long as the measured ones; multiplied, not measured."""
    rows = []
    for config in configs:
        own = [document for document in documents if document.config == config]
        steps = sum(len(document.kl) for document in own)
        held = sum(document.resident_bytes for document in own) / steps
        plain = sum(document.fp16_bytes for document in own) / steps
        cells = "".join(f"<td>{_size(held * n)} <small>of {_size(plain * n)}</small></td>" for n in SESSIONS)
        rows.append(f"<tr><td>{escape(config)}</td>{cells}</tr>")
    head = "".join(f"<th>{n:,} session{'s' if n > 1 else ''}</th>" for n in SESSIONS)
    note = (
        "<p>Resident bytes, and those of the same tokens in fp16: one session was measured, as the mean over its "
        "decode steps, and multiplied. What was fetched or is kept outside the device is not in it.</p>"
    )
    return f"<div class='wide'><table><tr><th>configuration</th>{head}</tr>{''.join(rows)}</table></div>{note}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def _document_plots(documents: Sequence[DocumentResult], configs: Sequence[str]) -> list[Section]:
    drawn = [(f"Bits of {config} at the end", plots.bits(documents, config)) for config in configs]
    drawn.append(("Exceptions", plots.exceptions(documents, configs)))
    return [(title, plot) for title, plot in drawn if plot is not None]


def _facts(about: Mapping[str, object]) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{_fact(name, value)}</dd>" for name, value in about.items())
    return f"<dl>{lines}</dl>"


def _fact(name: str, value: object) -> str:
    text = escape(str(value))
    return f"<code>{text}</code>" if name == "command" else text


def _raw(results: Sequence[EvalResult | PositionResult]) -> str:
    rows = [asdict(result) for result in results]
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row.values())}</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{head}</tr>{lines}</table></div>"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape("" if value is None else str(value))
