"""Decoding real text, or a passage of the prompt again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from qaq_eval.cli.eval.common import Asked, Outcome, Report, about, empty_table, fits, named_text, shown_name

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Config, Row


def run(loaded: LoadedModel, configs: list[Config], asked: Asked, report: Report) -> Outcome:
    from qaq_eval import quality

    source, written = named_text(asked.text)
    cut = quality.cut(written, loaded.tokenizer, asked.context, asked.decode, asked.documents, asked.offset_fraction)
    cut = [quality.with_recall(document) for document in cut] if asked.recall else cut
    fits(loaded, asked.context + asked.decode)
    said = {
        **about(loaded, "recall" if asked.recall else "text"),
        "text": source,
        "context": asked.context,
        "decode": asked.decode,
        "documents": asked.documents,
        "offset_fraction": asked.offset_fraction,
    }
    log = quality.PartLog(quality.run_name(said, cut), asked.journal)
    for part in quality.evaluate(loaded.model, loaded.fingerprint, cut, configs, log.has, report):
        log.add(part)
    names = [config.text for config in configs]
    parts = log.select(range(asked.documents), names)
    rows = [quality.summarize(parts, name, asked.context) for name in names]
    page = None
    if asked.html_path is not None:
        from qaq_eval.quality.report import text_page

        page = text_page(said, rows, parts)
    return Outcome({**said, "rows": [asdict(row) for row in rows]}, table(rows), page)


def table(rows: Sequence[Row]) -> Table:
    several = len({row.context for row in rows}) > 1
    columns = ("smaller", "bits K/V", "ΔNLL", "KL", "top-1", "B/tok")
    shown = empty_table("Against full precision", "config", *(["context"] if several else []), *columns)
    for row in rows:
        shown.add_row(
            shown_name(row.config),
            *([str(row.context)] if several else []),
            f"{row.compression:.2f}x",
            f"{row.bits_key:.2f}/{row.bits_value:.2f}",
            f"{row.delta_nll:+.4f}±{row.delta_nll_se:.3f}",
            f"{row.kl_mean:.4f}",
            f"{row.top1_agreement:.3f}",
            f"{row.requantize_bytes_per_token:.0f}",
        )
    return shown
