"""`qaq eval --needle`: needles in haystacks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from qaq_eval.cli.eval.common import (
    EvalOptions,
    EvalOutput,
    Report,
    about_model,
    check_length,
    config_cell,
    empty_table,
    read_text,
)

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Config


def run(loaded: LoadedModel, configs: list[Config], options: EvalOptions, report: Report) -> EvalOutput:
    from qaq_eval.quality import needle
    from qaq_eval.quality.journal import Journal, name_of

    name, text = read_text(options.text)
    check_length(loaded, options.context + needle.ANSWER_TOKENS)
    haystacks = needle.make_haystacks(text, loaded.tokenizer, options.context, options.trials, options.offset_fraction)
    about = {
        **about_model(loaded, "needle"),
        "text": name,
        "context": options.context,
        "offset_fraction": options.offset_fraction,
    }
    journal = Journal(name_of(about, haystacks[0].ids.numpy().tobytes()), options.journal)
    answers = journal.entries(needle.NeedleAnswer)
    done = {(answer.trial, answer.depth, answer.config) for answer in answers}

    def is_done(haystack: needle.Haystack, config: str) -> bool:
        return (haystack.trial, haystack.depth, config) in done

    for answer in needle.evaluate_needles(
        loaded.model, loaded.fingerprint, loaded.tokenizer, haystacks, configs, is_done, report
    ):
        journal.add(asdict(answer))
        answers.append(answer)
    results = needle.summarize_needles(
        [answer for answer in answers if answer.trial < options.trials],
        [config.text for config in configs],
        options.context,
    )
    table = empty_table("Codes found", "config", "smaller", "depth", "found", "in full precision")
    for result in results:
        table.add_row(
            config_cell(result.config),
            f"{result.compression:.2f}x",
            f"{result.depth}%",
            f"{result.found:.0%}",
            f"{result.found_fp16:.0%}",
        )
    return EvalOutput({**about, "trials": options.trials, "rows": [asdict(result) for result in results]}, table)
