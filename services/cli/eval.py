"""`qaq eval`: how close decoding from quantized caches stays to full precision, on real text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from services.cli.stack import Device, Dtype, JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen

if TYPE_CHECKING:
    from qaq_core.evaluation import Row

BUILTIN = "builtin"
CONFIGS = (
    "balanced,balanced-norequant,balanced@1.6,paper,paper-norequant,"
    "uniform-3,uniform-2,hadamard-3,hadamard-2,k4v2,kivi-4,kivi-2"
)


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Model = None,
    text: Annotated[str, typer.Option(help="A file of text, or 'builtin': the reference of Python.")] = BUILTIN,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 1024,
    decode: Annotated[int, typer.Option(min=1, help="Tokens that are decoded after it.")] = 128,
    documents: Annotated[int, typer.Option(min=1, help="How many documents are cut from the text.")] = 2,
    offset_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Where in the text they begin, 0 to 1.")
    ] = 0.0,
    configs: Annotated[
        str, typer.Option(help="Presets or rivals, by comma: balanced, balanced@2.2, paper[window=3]@4x.")
    ] = CONFIGS,
    recall: Annotated[
        bool, typer.Option("--recall", help="Decode a passage of the prompt, word for word.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_path: JsonPath = None,
) -> None:
    """Decodes real text from quantized caches and compares every step with full precision.

    With --json, finished parts are kept beside the file, and a run that was stopped goes on where it was.
    """
    from qaq_core import calibration, evaluation
    from qaq_core.loading import load_model

    parsed = evaluation.Config.parse_all(configs)
    chosen = [config.text for config in parsed]
    source, written = named_text(text)
    with progress_line() as report, calibration.shown(report):
        loaded = load_model(model_or_default(model), device, dtype, lambda what, share: report(what, None))
        cut = evaluation.cut(written, loaded.tokenizer, context, decode, documents, offset_fraction)
        cut = [evaluation.with_recall(document) for document in cut] if recall else cut
        longest = context + decode
        if longest > loaded.context_length:
            raise typer.BadParameter(f"{longest} tokens are more than the model's {loaded.context_length}")
        about: dict[str, Any] = {
            "model": loaded.name,
            "fingerprint": loaded.fingerprint,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "task": "recall" if recall else "text",
            "text": source,
            "context": context,
            "decode": decode,
            "documents": documents,
            "offset_fraction": offset_fraction,
        }
        log = evaluation.PartLog(evaluation.run_name(about, cut), json_path and beside(json_path))
        for part in evaluation.evaluate(loaded.model, loaded.fingerprint, cut, parsed, log.has, report):
            log.add(part)
    parts = log.select(range(documents), chosen)
    rows = [evaluation.summarize(parts, name, context) for name in chosen]
    screen.print(table(rows), highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def named_text(text: str) -> tuple[str, str]:
    """A name for the text, and the text."""
    from qaq_core.errors import ConfigError
    from qaq_core.evaluation import builtin_text

    if text == BUILTIN:
        return BUILTIN, builtin_text()
    try:
        return Path(text).name, Path(text).read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text} is not UTF-8 text ({error.reason}); give a text file, or 'builtin'") from error


def beside(path: Path) -> Path:
    """The file of finished parts."""
    return path.with_name(f"{path.name}.parts.jsonl")


def table(rows: list[Row]) -> Table:
    shown = Table(title="Against full precision", title_justify="left", box=None, padding=(0, 2, 0, 0))
    shown.add_column("config", no_wrap=True)
    for name in ("context", "smaller", "bits K/V", "ΔNLL", "KL", "top-1", "B/tok"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.config,
            str(row.context),
            f"{row.compression:.2f}x",
            f"{row.bits_key:.2f}/{row.bits_value:.2f}",
            f"{row.delta_nll:+.4f}±{row.delta_nll_se:.3f}",
            f"{row.kl_mean:.4f}",
            f"{row.top1_agreement:.3f}",
            f"{row.requantize_bytes_per_token:.0f}",
        )
    return shown
