"""`qaq paper`: the paper's experiments on any model and text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qaq_eval.cli.eval import BUILTIN, journal_path, read_text, result_table, show_table
from qaq_eval.cli.experiments import EXPERIMENTS, Experiment
from services.cli.options import Device, Dtype, JsonPath, Model, model_or_default
from services.cli.terminal import progress_line

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Document, EvalResult, LayerDistribution, ResultLog

_LIST = "\n\n".join(f"{name}: {experiment.about}" for name, experiment in EXPERIMENTS.items())


def register(app: typer.Typer) -> None:
    app.command("paper", help=f"Runs an experiment of the paper, or one on a question that it leaves open.\n\n{_LIST}")(
        paper
    )


def paper(
    experiment: Annotated[str, typer.Argument(help="One of the above.")],
    model: Model = None,
    text: Annotated[str, typer.Option(help="A text file, or 'builtin': the reference of Python.")] = BUILTIN,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 1024,
    decode: Annotated[int, typer.Option(min=1, help="Tokens decoded after each prompt.")] = 128,
    documents: Annotated[int, typer.Option(min=1, help="Number of documents, cut from the text.")] = 2,
    offset_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Where in the text the documents begin, 0 to 1.")
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
    name, content = read_text(text)
    with progress_line() as report, calibration.shown(report):
        loaded = load_model(model_or_default(model), device, dtype, lambda stage, share: report(stage, None))
        contexts = _contexts(chosen, context, loaded.context_length - decode)
        about: dict[str, Any] = {
            "model": loaded.name,
            "fingerprint": loaded.fingerprint,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "experiment": experiment,
            "text": name,
            "decode": decode,
            "documents": documents,
            "offset_fraction": offset_fraction,
        }
        texts = {
            length: quality.cut_documents(content, loaded.tokenizer, length, decode, documents, offset_fraction)
            for length in contexts
        }
        if not chosen.configs:
            layers = quality.distribution(loaded.model, loaded.fingerprint, texts[context], report)
            rows = [asdict(layer) for layer in layers]
            table = _distribution_table(layers)
        else:
            results = [
                result for cut in texts.values() for result in _evaluate(loaded, chosen, cut, about, json_path, report)
            ]
            rows = [asdict(result) for result in results]
            table = result_table(results)
    table.title = chosen.about
    show_table(table)
    if json_path is not None:
        json_path.write_text(json.dumps({**about, "contexts": contexts, "rows": rows}, indent=1) + "\n")


def _contexts(experiment: Experiment, own: int, longest: int) -> list[int]:
    """Lengths of prompts, at most `longest`."""
    if not experiment.contexts:
        if own > longest:
            raise typer.BadParameter(f"the model's context allows prompts of {longest} tokens at most, not {own}")
        return [own]
    return list(dict.fromkeys(min(length, longest) for length in experiment.contexts))


def _evaluate(
    loaded: LoadedModel,
    experiment: Experiment,
    documents: list[Document],
    about: dict[str, Any],
    json_path: JsonPath,
    report: Callable[[str, float | None], None],
) -> list[EvalResult]:
    """One result per configuration. Finished work is kept in a journal beside the JSON file."""
    from qaq_eval import quality

    configs = [quality.Config.parse(name) for name in experiment.configs]
    length = documents[0].context
    run = quality.run_name({**about, "experiment": None, "context": length}, documents)
    log: ResultLog = quality.ResultLog(run, json_path and journal_path(json_path))
    for result in quality.evaluate(loaded.model, loaded.fingerprint, documents, configs, log.has, report):
        log.add(result)
    results = log.select(range(len(documents)), experiment.configs)
    return [quality.summarize(results, name, length) for name in experiment.configs]


def _distribution_table(layers: list[LayerDistribution]) -> Table:
    table = Table(title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "side", "mean", "deviation", "0.1%", "99.9%", "largest", "> 4 dev.", "in 1/16 channels"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in layers:
        quantiles = layer.quantiles
        table.add_row(
            str(layer.layer),
            layer.side,
            f"{layer.mean:.2f}",
            f"{layer.deviation:.2f}",
            f"{quantiles['0.001']:.1f}",
            f"{quantiles['0.999']:.1f}",
            f"{max(abs(quantiles['0.0']), abs(quantiles['1.0'])):.1f}",
            f"{layer.beyond['4']:.2%}",
            f"{layer.in_few_channels:.0%}",
        )
    return table
