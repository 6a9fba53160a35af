"""`qaq eval --needles N` and `--formats N`: sessions that are asked several things late."""

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


def needles(loaded: LoadedModel, configs: list[Config], options: EvalOptions, report: Report) -> EvalOutput:
    return _run(loaded, configs, options, report, "needles", options.needles)


def formats(loaded: LoadedModel, configs: list[Config], options: EvalOptions, report: Report) -> EvalOutput:
    return _run(loaded, configs, options, report, "formats", options.formats)


def _run(
    loaded: LoadedModel, configs: list[Config], options: EvalOptions, report: Report, task: str, count: int
) -> EvalOutput:
    from qaq_eval.quality import late, probes
    from qaq_eval.quality.journal import Journal, name_of

    name, text = read_text(options.text)
    check_length(loaded, options.context)
    make = late.needle_sessions if task == "needles" else late.format_sessions
    sessions = make(text, loaded.tokenizer, options.context, count, options.trials, options.offset_fraction)
    about = {
        **about_model(loaded, task),
        "text": name,
        "context": options.context,
        "count": count,
        "offset_fraction": options.offset_fraction,
        **options.window_fact,
    }
    journal = Journal(name_of(about, sessions[0].prompt.numpy().tobytes()), options.journal)
    # A stopped run leaves whole sessions of a configuration, and parts of one, which is asked again.
    answers = {(each.trial, each.config, each.order): each for each in journal.entries(probes.ProbeAnswer)}
    known = frozenset(answers)

    def is_done(trial: int, config: str) -> bool:
        return all((trial, config, order) in known for order in range(len(sessions[0].probes)))

    for answer in probes.evaluate_probes(
        loaded.model, loaded.fingerprint, loaded.tokenizer, sessions, configs, is_done, report, options.window
    ):
        journal.add(asdict(answer))
        answers[answer.trial, answer.config, answer.order] = answer
    results = probes.summarize_probes(
        [answer for answer in answers.values() if answer.trial < options.trials], [config.text for config in configs]
    )
    title = "Codes found" if task == "needles" else "Formats kept"
    table = empty_table(title, "config", "smaller", "asked", "for", "at", "right", "in full precision")
    for result in results:
        table.add_row(
            config_cell(result.config),
            f"{result.compression:.2f}x",
            f"{result.order}.",
            result.name if task == "formats" else "a code",
            f"{result.position:,}",
            f"{result.score:.0%}",
            f"{result.score_fp16:.0%}",
        )
    return EvalOutput({**about, "trials": options.trials, "rows": [asdict(result) for result in results]}, table)
