"""Needles in haystacks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from qaq_eval.cli.eval.common import Asked, Outcome, Report, about, empty_table, fits, named_text, shown_name

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Config


def run(loaded: LoadedModel, configs: list[Config], asked: Asked, report: Report) -> Outcome:
    from qaq_eval.quality import needle
    from qaq_eval.quality.journal import Journal, name_of

    source, written = named_text(asked.text)
    fits(loaded, asked.context + needle.ANSWER_TOKENS)
    haystacks = needle.hide(written, loaded.tokenizer, asked.context, asked.trials, asked.offset_fraction)
    said = {
        **about(loaded, "needle"),
        "text": source,
        "context": asked.context,
        "offset_fraction": asked.offset_fraction,
    }
    journal = Journal(name_of(said, haystacks[0].ids.numpy().tobytes()), asked.journal)
    known = journal.entries(needle.Found)
    done = {(found.trial, found.depth, found.config) for found in known}

    def has(haystack: needle.Haystack, config: str) -> bool:
        return (haystack.trial, haystack.depth, config) in done

    model = loaded.model
    for found in needle.search(model, loaded.fingerprint, loaded.tokenizer, haystacks, configs, has, report):
        journal.add(asdict(found))
        known.append(found)
    rows = needle.needle_rows(
        [found for found in known if found.trial < asked.trials],
        [config.text for config in configs],
        asked.context,
    )
    shown = empty_table("Codes found", "config", "smaller", "depth", "found", "in full precision")
    for row in rows:
        shown.add_row(
            shown_name(row.config),
            f"{row.compression:.2f}x",
            f"{row.depth}%",
            f"{row.found:.0%}",
            f"{row.found_fp16:.0%}",
        )
    return Outcome({**said, "trials": asked.trials, "rows": [asdict(row) for row in rows]}, shown)
