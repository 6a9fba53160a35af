"""`qaq eval --long`: answers that the model generates itself, and the loss along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

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
    from qaq_eval.quality.long import PositionResult


def run(loaded: LoadedModel, configs: list[Config], options: EvalOptions, report: Report) -> EvalOutput:
    from qaq_eval import quality
    from qaq_eval.quality import long
    from qaq_eval.quality.journal import Journal

    name, text = read_text(options.text)
    check_length(loaded, options.context + options.decode)
    prompts = quality.cut_documents(
        text, loaded.tokenizer, options.context, options.decode, options.documents, options.offset_fraction
    )
    about = {
        **about_model(loaded, "long"),
        "text": name,
        "context": options.context,
        "decode": options.decode,
        "documents": options.documents,
        "offset_fraction": options.offset_fraction,
        **options.window_fact,
    }
    run_name = quality.run_name(about, prompts)
    answers = Journal(run_name, options.journal)
    known = {each.document: each.tokens for each in answers.entries(long.Continuation)}
    for answer in long.generate(loaded.model, loaded.fingerprint, prompts, known, report):
        answers.add(asdict(answer))
        known[answer.document] = answer.tokens
    documents = [long.continued(document, known[document.index]) for document in prompts]
    log = quality.ResultLog(run_name, options.journal)
    for result in quality.evaluate(
        loaded.model, loaded.fingerprint, documents, configs, log.has, report, options.window
    ):
        log.add(result)
    names = [config.text for config in configs]
    by_document = log.select(range(options.documents), names)
    results = [quality.summarize(by_document, name, options.context) for name in names]
    positions = [part for name in names for part in long.summarize_positions(by_document, name)]
    page = None
    if options.html_path is not None:
        from qaq_eval.quality.provenance import provenance
        from qaq_eval.quality.report import long_report

        page = long_report(about, results, positions, by_document, provenance())
    rows = {name: [asdict(each) for each in kind] for name, kind in (("rows", results), ("positions", positions))}
    return EvalOutput({**about, **rows}, position_table(positions), page)


def position_table(positions: Sequence[PositionResult]) -> Table:
    """A table of the loss along the answers."""
    table = empty_table(
        "Along the answer, against full precision", "config", "tokens", "ΔNLL", "KL", "median", "p99", "max"
    )
    for part in positions:
        table.add_row(
            config_cell(part.config),
            f"{part.first}-{part.last}",
            f"{part.delta_nll:+.4f}±{part.delta_nll_se:.3f}",
            f"{part.kl_mean:.4f}±{part.kl_mean_se:.4f}",
            f"{part.kl_median:.4f}",
            f"{part.kl_p99:.3f}",
            f"{part.kl_max:.2f}",
        )
    return table
