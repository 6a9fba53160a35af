"""Sessions of many turns."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from qaq_eval.cli.eval.common import Asked, Outcome, Report, about, empty_table, fits, named_text, shown_name

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Config


def run(loaded: LoadedModel, configs: list[Config], asked: Asked, report: Report) -> Outcome:
    from qaq_eval import quality
    from qaq_eval.quality import turns

    source, written = named_text(asked.text)
    fits(loaded, asked.turns * (asked.context + asked.decode))
    sessions = turns.cut_sessions(
        written,
        loaded.tokenizer,
        asked.turns,
        asked.context,
        asked.decode,
        asked.documents,
        asked.offset_fraction,
    )
    said = {
        **about(loaded, "turns"),
        "text": source,
        "turns": asked.turns,
        "context": asked.context,
        "decode": asked.decode,
        "documents": asked.documents,
        "offset_fraction": asked.offset_fraction,
    }
    log = quality.PartLog(quality.run_name(said, sessions), asked.journal)
    for part in turns.evaluate_turns(loaded.model, loaded.fingerprint, sessions, asked.turns, configs, log.has, report):
        log.add(part)
    names = [config.text for config in configs]
    rows = [
        row
        for turn in range(1, asked.turns + 1)
        for row in turns.turn_rows(log.select(range(asked.documents), names, turn), names, asked.context, turn)
    ]
    shown = empty_table("Against full precision", "config", "turn", "smaller", "ΔNLL", "KL", "top-1", "B/tok")
    for row in sorted(rows, key=lambda row: names.index(row.config)):
        shown.add_row(
            shown_name(row.config),
            str(row.turn),
            f"{row.compression:.2f}x",
            f"{row.delta_nll:+.4f}±{row.delta_nll_se:.3f}",
            f"{row.kl_mean:.4f}",
            f"{row.top1_agreement:.3f}",
            f"{row.requantize_bytes_per_token:.0f}",
        )
    page = None
    if asked.html_path is not None:
        from qaq_eval.quality.report import turns_page

        last = log.select(range(asked.documents), names, asked.turns)
        page = turns_page(said, rows, last)
    return Outcome({**said, "rows": [asdict(row) for row in rows]}, shown, page)
