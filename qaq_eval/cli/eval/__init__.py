"""`qaq eval`: how close decoding from quantized caches stays to full precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qaq_eval.cli.eval import needle, tasks, text, turns
from qaq_eval.cli.eval.common import BUILTIN, Asked, Kind, beside, named_text
from qaq_eval.cli.eval.text import table
from services.cli.stack import Device, Dtype, JsonPath, Model, Weights, model_or_default
from services.cli.terminal import progress_line, screen

__all__ = ["BUILTIN", "beside", "evaluate", "named_text", "register", "table"]

TEXT_CONFIGS = (
    "balanced,balanced-norequant,balanced@1.6,paper,paper-norequant,"
    "uniform-3,uniform-2,hadamard-3,hadamard-2,k4v2,kivi-4,kivi-2,h2o@6x,scissorhands@6x"
)
OTHER_CONFIGS = "balanced@8x,balanced-norequant@8x,uniform-2,kivi-2,h2o@8x,scissorhands@8x"


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Model = None,
    source: Annotated[
        str, typer.Option("--text", help="A file of text, or 'builtin': the reference of Python.")
    ] = BUILTIN,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 1024,
    decode: Annotated[int, typer.Option(min=1, help="Tokens that are decoded after it.")] = 128,
    documents: Annotated[int, typer.Option(min=1, help="How many documents are cut from the text.")] = 2,
    offset_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Where in the text they begin, 0 to 1.")
    ] = 0.0,
    configs: Annotated[
        str | None,
        typer.Option(help="Presets or baselines, by comma: balanced@2.2, paper[attention_window=3]@4x."),
    ] = None,
    recall: Annotated[bool, typer.Option("--recall", help="Decode a passage of the prompt, word for word.")] = False,
    turn_count: Annotated[
        int, typer.Option("--turns", min=0, help="Turns of one session, each a prompt and a decode.")
    ] = 0,
    hide: Annotated[
        bool, typer.Option("--needle", help="Ask for a code that is hidden at nine depths of the prompt.")
    ] = False,
    trials: Annotated[int, typer.Option(min=1, help="Needles per depth, with texts of their own.")] = 1,
    task_names: Annotated[
        str, typer.Option("--tasks", help="Multiple choice by lm-eval: hellaswag,piqa,arc_easy,mathqa.")
    ] = "",
    task_file: Annotated[
        list[str] | None, typer.Option(help="TASK=FILE of JSON lines; without one the task comes from the hub.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="How many of each task; all if not given.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Answered questions before each question.")] = 0,
    window: Annotated[int | None, typer.Option(min=1, help="Recent tokens that stay exact in multiple choice.")] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots there: of texts and turns.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "plain",
    json_path: JsonPath = None,
) -> None:
    """Decodes from quantized caches and compares with full precision: text, turns, needles, multiple choice.

    With --json, finished parts are kept beside the file, and a run that was stopped goes on where it was.
    """
    from qaq_core import calibration
    from qaq_core.models import load_model
    from qaq_eval import quality

    kind = _kind(recall, turn_count, hide, task_names)
    if html_path is not None and kind in (needle.run, tasks.run):
        raise typer.BadParameter("--html shows texts and turns; leave it out, or --needle and --tasks")
    asked = Asked(
        text=source,
        context=context,
        decode=decode,
        documents=documents,
        offset_fraction=offset_fraction,
        recall=recall,
        turns=turn_count,
        trials=trials,
        tasks=tuple(name.strip() for name in task_names.split(",") if name.strip()),
        task_files=_files(task_file or []),
        questions=questions,
        shots=shots,
        window=window,
        json_path=json_path,
        html_path=html_path,
    )
    parsed = quality.Config.parse_all(configs or (TEXT_CONFIGS if kind is text.run else OTHER_CONFIGS))
    with progress_line() as report, calibration.shown(report):
        loaded = load_model(model_or_default(model), device, dtype, lambda what, share: report(what, None), weights)
        outcome = kind(loaded, parsed, asked, report)
    screen.print(outcome.shown, highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps(outcome.figures, indent=1) + "\n")
    if html_path is not None and outcome.page is not None:
        html_path.write_text(outcome.page)


def _kind(recall: bool, turn_count: int, hide: bool, task_names: str) -> Kind:
    """Which evaluation was asked for; text if none was named."""
    named: list[Kind] = []
    for wanted, kind in (
        (recall, text.run),
        (turn_count > 0, turns.run),
        (hide, needle.run),
        (bool(task_names), tasks.run),
    ):
        if wanted:
            named.append(kind)
    if len(named) > 1:
        raise typer.BadParameter("--recall, --turns, --needle and --tasks are evaluations of their own: take one")
    return named[0] if named else text.run


def _files(named: list[str]) -> dict[str, Path]:
    pairs = [entry.partition("=") for entry in named]
    for task, equals, path in pairs:
        if not (task and equals and path):
            raise typer.BadParameter("write --task-file as a task and its file, such as piqa=questions.jsonl")
    return {task: Path(path) for task, _, path in pairs}
