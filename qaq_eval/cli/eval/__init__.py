"""`qaq eval`: compares decoding from quantized caches with full precision."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from qaq_eval.cli.eval import long, needle, probes, tasks, text, turns
from qaq_eval.cli.eval.common import BUILTIN, EvalOptions, Kind, journal_path, read_text, show_table
from qaq_eval.cli.eval.text import result_table
from services.cli.options import Device, Dtype, JsonPath, Model, Weights, model_or_default
from services.cli.terminal import progress_line

__all__ = ["BUILTIN", "evaluate", "journal_path", "read_text", "register", "result_table", "show_table"]

TEXT_CONFIGS = (
    "balanced,balanced-norequant,balanced@1.6,paper,paper-norequant,"
    "uniform-3,uniform-2,hadamard-3,hadamard-2,k4v2,kivi-4,kivi-2,h2o@6x,scissorhands@6x"
)
LONG_CONFIGS = "balanced,balanced-norequant,kivi-2,oscar-2,turboquant-3bit"
OTHER_CONFIGS = "balanced@8x,balanced-norequant@8x,uniform-2,kivi-2,h2o@8x,scissorhands@8x"


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Model = None,
    source: Annotated[
        str, typer.Option("--text", help="A text file, or 'builtin': the reference of Python.")
    ] = BUILTIN,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 1024,
    decode: Annotated[int, typer.Option(min=1, help="Tokens decoded after each prompt.")] = 128,
    documents: Annotated[int, typer.Option(min=1, help="Number of documents, cut from the text.")] = 2,
    offset_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Where in the text the documents begin, 0 to 1.")
    ] = 0.0,
    configs: Annotated[
        str | None,
        typer.Option(help="Presets or baselines, separated by commas: balanced@2.2, paper[attention_window=3]@4x."),
    ] = None,
    recall: Annotated[bool, typer.Option("--recall", help="Decode a passage of the prompt, word for word.")] = False,
    long_answers: Annotated[
        bool, typer.Option("--long", help="Decode what the model itself generates after each prompt; loss by position.")
    ] = False,
    turn_count: Annotated[
        int, typer.Option("--turns", min=0, help="Turns of each session, each a prompt and a decode.")
    ] = 0,
    hide_needle: Annotated[
        bool, typer.Option("--needle", help="Ask for a code hidden at nine depths of the prompt.")
    ] = False,
    needle_count: Annotated[
        int, typer.Option("--needles", min=0, help="Hide so many codes in one text and ask for one after the other.")
    ] = 0,
    format_count: Annotated[
        int, typer.Option("--formats", min=0, help="Set a format at the beginning and ask for it so many times.")
    ] = 0,
    trials: Annotated[int, typer.Option(min=1, help="Needles per depth, or sessions, each in another text.")] = 1,
    task_names: Annotated[
        str, typer.Option("--tasks", help="Multiple-choice tasks of lm-eval: hellaswag,piqa,arc_easy,mathqa.")
    ] = "",
    task_file: Annotated[
        list[str] | None, typer.Option(help="TASK=FILE: questions as JSON lines; default: from the hub. Repeatable.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Questions of each task; default: all.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Answered questions before each question.")] = 0,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Recent tokens that stay exact in all configurations."),
    ] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots of text or turns to this file.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    weights: Weights = "plain",
    json_path: JsonPath = None,
) -> None:
    """Compares decoding from quantized caches with full precision: text, long answers, turns, needles, choices.

    With --json, finished work is kept in a journal beside the file, and an interrupted run can be resumed.
    """
    from qaq_core import calibration
    from qaq_core.models import load_model
    from qaq_eval import quality

    kind = _kind(recall, long_answers, turn_count, hide_needle, needle_count, format_count, task_names)
    if html_path is not None and kind not in (text.run, long.run, turns.run):
        raise typer.BadParameter("--html shows texts and turns; leave it out, or --needle and --tasks")
    if window is not None and kind is needle.run:
        raise typer.BadParameter("--needle has every configuration's own residual window; leave --window out")
    # A package that is missing is named before anything is computed.
    for module, used in (("report", html_path is not None), ("tasks", kind is tasks.run)):
        if used:
            import_module(f"qaq_eval.quality.{module}")
    options = EvalOptions(
        text=source,
        context=context,
        decode=decode,
        documents=documents,
        offset_fraction=offset_fraction,
        recall=recall,
        turns=turn_count,
        needles=needle_count,
        formats=format_count,
        trials=trials,
        tasks=tuple(name.strip() for name in task_names.split(",") if name.strip()),
        task_files=_files(task_file or []),
        questions=questions,
        shots=shots,
        window=window,
        json_path=json_path,
        html_path=html_path,
    )
    usual = TEXT_CONFIGS if kind is text.run else LONG_CONFIGS if kind is long.run else OTHER_CONFIGS
    parsed = quality.Config.parse_all(configs or usual)
    with progress_line() as report, calibration.shown(report):
        loaded = load_model(model_or_default(model), device, dtype, lambda stage, share: report(stage, None), weights)
        output = kind(loaded, parsed, options, report)
    show_table(output.table)
    if json_path is not None:
        json_path.write_text(json.dumps(output.json, indent=1) + "\n")
    if html_path is not None and output.page is not None:
        html_path.write_text(output.page)


def _kind(
    recall: bool,
    long_answers: bool,
    turn_count: int,
    hide_needle: bool,
    needle_count: int,
    format_count: int,
    task_names: str,
) -> Kind:
    """The kind of evaluation that the options name; text by default."""
    kinds: list[Kind] = []
    for named, kind in (
        (recall, text.run),
        (long_answers, long.run),
        (turn_count > 0, turns.run),
        (hide_needle, needle.run),
        (needle_count > 0, probes.needles),
        (format_count > 0, probes.formats),
        (bool(task_names), tasks.run),
    ):
        if named:
            kinds.append(kind)
    if len(kinds) > 1:
        raise typer.BadParameter(
            "--recall, --long, --turns, --needle, --needles, --formats and --tasks exclude each other: take one"
        )
    return kinds[0] if kinds else text.run


def _files(entries: list[str]) -> dict[str, Path]:
    pairs = [entry.partition("=") for entry in entries]
    for task, equals, path in pairs:
        if not (task and equals and path):
            raise typer.BadParameter("write --task-file as a task and its file, such as piqa=questions.jsonl")
    return {task: Path(path) for task, _, path in pairs}
