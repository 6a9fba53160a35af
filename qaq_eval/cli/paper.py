"""`qaq paper`: the paper's experiments on any model and text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qaq_eval.cli.eval import BUILTIN, beside, named_text, table
from qaq_eval.cli.experiments import EXPERIMENTS, Experiment
from services.cli.stack import Device, Dtype, JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Document, PartLog, Row, Spread

_LIST = "\n\n".join(f"{name}: {experiment.about}" for name, experiment in EXPERIMENTS.items())


def register(app: typer.Typer) -> None:
    app.command("paper", help=f"Runs one of the paper's experiments, or of the questions it leaves open.\n\n{_LIST}")(
        paper
    )


def paper(
    experiment: Annotated[str, typer.Argument(help="One of these.")],
    model: Model = None,
    text: Annotated[str, typer.Option(help="A file of text, or 'builtin': the reference of Python.")] = BUILTIN,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 1024,
    decode: Annotated[int, typer.Option(min=1, help="Tokens that are decoded after it.")] = 128,
    documents: Annotated[int, typer.Option(min=1, help="How many documents are cut from the text.")] = 2,
    offset_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Where in the text they begin, 0 to 1.")
    ] = 0.0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_path: JsonPath = None,
) -> None:
    from qaq_core import calibration
    from qaq_core.models import load_model
    from qaq_eval import quality

    if experiment not in EXPERIMENTS:
        raise typer.BadParameter(f"no experiment is called {experiment}; there are {', '.join(EXPERIMENTS)}")
    chosen = EXPERIMENTS[experiment]
    source, written = named_text(text)
    with progress_line() as report, calibration.shown(report):
        loaded = load_model(model_or_default(model), device, dtype, lambda what, share: report(what, None))
        contexts = _contexts(chosen, context, loaded.context_length - decode)
        about: dict[str, Any] = {
            "model": loaded.name,
            "fingerprint": loaded.fingerprint,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "experiment": experiment,
            "text": source,
            "decode": decode,
            "documents": documents,
            "offset_fraction": offset_fraction,
        }
        texts = {
            length: quality.cut(written, loaded.tokenizer, length, decode, documents, offset_fraction)
            for length in contexts
        }
        if not chosen.configs:
            spreads = quality.distribution(loaded.model, loaded.fingerprint, texts[context], report)
            rows = [asdict(spread) for spread in spreads]
            shown = _spreads(spreads)
        else:
            measured = [row for cut in texts.values() for row in _rows(loaded, chosen, cut, about, json_path, report)]
            rows = [asdict(row) for row in measured]
            shown = table(measured)
    shown.title = chosen.about
    screen.print(shown, highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps({**about, "contexts": contexts, "rows": rows}, indent=1) + "\n")


def _contexts(experiment: Experiment, own: int, longest: int) -> list[int]:
    """Lengths of prompts, none beyond what the model can decode after."""
    if not experiment.contexts:
        if own > longest:
            raise typer.BadParameter(f"the model has room for prompts of {longest} tokens at most, not {own}")
        return [own]
    return list(dict.fromkeys(min(length, longest) for length in experiment.contexts))


def _rows(
    loaded: LoadedModel,
    experiment: Experiment,
    documents: list[Document],
    about: dict[str, Any],
    json_path: JsonPath,
    report: Callable[[str, float | None], None],
) -> list[Row]:
    """A row per configuration. Finished parts are kept beside the JSON file."""
    from qaq_eval import quality

    configs = [quality.Config.parse(name) for name in experiment.configs]
    length = documents[0].context
    run = quality.run_name({**about, "experiment": None, "context": length}, documents)
    log: PartLog = quality.PartLog(run, json_path and beside(json_path))
    for part in quality.evaluate(loaded.model, loaded.fingerprint, documents, configs, log.has, report):
        log.add(part)
    parts = log.select(range(len(documents)), experiment.configs)
    return [quality.summarize(parts, name, length) for name in experiment.configs]


def _spreads(spreads: list[Spread]) -> Table:
    shown = Table(title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "side", "mean", "deviation", "0.1%", "99.9%", "largest", "> 4 dev.", "in 1/16 channels"):
        shown.add_column(name, justify="right", no_wrap=True)
    for spread in spreads:
        at = spread.quantiles
        shown.add_row(
            str(spread.layer),
            spread.side,
            f"{spread.mean:.2f}",
            f"{spread.deviation:.2f}",
            f"{at['0.001']:.1f}",
            f"{at['0.999']:.1f}",
            f"{max(abs(at['0.0']), abs(at['1.0'])):.1f}",
            f"{spread.beyond['4']:.2%}",
            f"{spread.in_few_channels:.0%}",
        )
    return shown
