"""`qaq eval`: decoding of real text, or with --recall of a passage of the prompt."""

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
    from qaq_eval.quality import Config, EvalResult


def run(loaded: LoadedModel, configs: list[Config], options: EvalOptions, report: Report) -> EvalOutput:
    from qaq_eval import quality

    name, text = read_text(options.text)
    documents = quality.cut_documents(
        text, loaded.tokenizer, options.context, options.decode, options.documents, options.offset_fraction
    )
    if options.recall:
        documents = [quality.with_recall(document) for document in documents]
    check_length(loaded, options.context + options.decode)
    about = {
        **about_model(loaded, "recall" if options.recall else "text"),
        "text": name,
        "context": options.context,
        "decode": options.decode,
        "documents": options.documents,
        "offset_fraction": options.offset_fraction,
        **options.window_fact,
    }
    log = quality.ResultLog(quality.run_name(about, documents), options.journal)
    for result in quality.evaluate(
        loaded.model, loaded.fingerprint, documents, configs, log.has, report, options.window
    ):
        log.add(result)
    names = [config.text for config in configs]
    by_document = log.select(range(options.documents), names)
    results = [quality.summarize(by_document, name, options.context) for name in names]
    page = None
    if options.html_path is not None:
        from qaq_eval.quality.provenance import provenance
        from qaq_eval.quality.report import text_report

        page = text_report(about, results, by_document, provenance())
    return EvalOutput({**about, "rows": [asdict(result) for result in results]}, result_table(results), page)


def result_table(results: Sequence[EvalResult]) -> Table:
    """A table of results. The context has a column if it varies."""
    several = len({result.context for result in results}) > 1
    columns = ("smaller", "bits K/V", "ΔNLL", "KL", "median", "p99", "max", "top-1", "B/tok")
    table = empty_table("Against full precision", "config", *(["context"] if several else []), *columns)
    for result in results:
        table.add_row(
            config_cell(result.config),
            *([str(result.context)] if several else []),
            f"{result.compression:.2f}x",
            f"{result.bits_key:.2f}/{result.bits_value:.2f}",
            f"{result.delta_nll:+.4f}±{result.delta_nll_se:.3f}",
            f"{result.kl_mean:.4f}±{result.kl_mean_se:.4f}",
            f"{result.kl_median:.4f}",
            f"{result.kl_p99:.3f}±{result.kl_p99_se:.3f}",
            f"{result.kl_max:.2f}±{result.kl_max_se:.2f}",
            f"{result.top1_agreement:.3f}",
            f"{result.requantize_bytes_per_token:.0f}",
        )
    return table
