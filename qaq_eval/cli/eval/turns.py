"""`qaq eval --turns`: sessions of many turns."""

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
    from qaq_eval import quality
    from qaq_eval.quality import turns

    name, text = read_text(options.text)
    check_length(loaded, options.turns * (options.context + options.decode))
    sessions = turns.cut_sessions(
        text,
        loaded.tokenizer,
        options.turns,
        options.context,
        options.decode,
        options.documents,
        options.offset_fraction,
    )
    about = {
        **about_model(loaded, "turns"),
        "text": name,
        "turns": options.turns,
        "context": options.context,
        "decode": options.decode,
        "documents": options.documents,
        "offset_fraction": options.offset_fraction,
        **options.window_fact,
    }
    log = quality.ResultLog(quality.run_name(about, sessions), options.journal)
    for result in turns.evaluate_turns(
        loaded.model, loaded.fingerprint, sessions, options.turns, configs, log.has, report, options.window
    ):
        log.add(result)
    names = [config.text for config in configs]
    results = [
        result
        for turn in range(1, options.turns + 1)
        for result in turns.summarize_turn(
            log.select(range(options.documents), names, turn), names, options.context, turn
        )
    ]
    table = empty_table(
        "Against full precision", "config", "turn", "smaller", "ΔNLL", "KL", "p99", "max", "top-1", "B/tok"
    )
    for turn_result in sorted(results, key=lambda result: names.index(result.config)):
        table.add_row(
            config_cell(turn_result.config),
            str(turn_result.turn),
            f"{turn_result.compression:.2f}x",
            f"{turn_result.delta_nll:+.4f}±{turn_result.delta_nll_se:.3f}",
            f"{turn_result.kl_mean:.4f}",
            f"{turn_result.kl_p99:.3f}",
            f"{turn_result.kl_max:.2f}",
            f"{turn_result.top1_agreement:.3f}",
            f"{turn_result.requantize_bytes_per_token:.0f}",
        )
    page = None
    if options.html_path is not None:
        from qaq_eval.quality.provenance import provenance
        from qaq_eval.quality.report import turns_report

        last_turn = log.select(range(options.documents), names, options.turns)
        page = turns_report(about, results, last_turn, provenance())
    return EvalOutput({**about, "rows": [asdict(result) for result in results]}, table, page)
