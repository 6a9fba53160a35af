"""The sections on rivals of today and on long answers, and their plots: one of each kind for each model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.results import plot, tables
from tools.results.runs import Json, Runs

NOTHING = "No run is recorded."


@dataclass(frozen=True)
class Picture:
    """A plot: the file's name below docs/results, its title and its points; `along` is of `plot.draw`."""

    name: str
    title: str
    points: list[plot.Point]
    along: bool


def rivals(measured: Sequence[Runs]) -> str:
    """The figures of all methods with the same exact tokens."""
    if not measured:
        return NOTHING
    return "\n\n".join([*_shown(pictures(measured, [])), tables.quality(measured), tables.sources(measured)])


def late(measured: Sequence[Runs]) -> str:
    """Long answers, turns, needles and formats."""
    if not measured:
        return NOTHING
    by_task: dict[str, list[Runs]] = {}
    for runs in measured:
        by_task.setdefault(runs.first["task"], []).append(runs)
    parts = _shown(pictures([], measured))
    if "long" in by_task:
        parts.append(_positions(by_task["long"]))
    if "turns" in by_task:
        parts.append(tables.bullets(f"{tables.turns(runs.first)} ({runs.link})" for runs in by_task["turns"]))
    parts += [_probes(by_task[task], task) for task in ("needles", "formats") if task in by_task]
    return "\n\n".join([*parts, tables.sources(measured)])


def pictures(measured: Sequence[Runs], long: Sequence[Runs]) -> list[Picture]:
    """The plots of both sections."""
    drawn = []
    for along, kind, every in ((False, "rivals", measured), (True, "long", long)):
        by_model: dict[str, list[Runs]] = {}
        for runs in every:
            if not along or runs.first["task"] == "long":
                by_model.setdefault(tables.model_name(runs.first), []).append(runs)
        for model, own in by_model.items():
            largest = max(own, key=lambda runs: runs.first["context"]).first
            points = _along(largest) if along else plot.points(largest["rows"])
            size = f"{largest['context']:,} tokens"
            title = f"{model}, answers after {size}" if along else f"{model}, {size} of {largest['text']}"
            drawn.append(Picture(f"{kind}-{_slug(model)}.svg", title, points, along))
    return drawn


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _shown(drawn: Sequence[Picture]) -> list[str]:
    return [f"![{picture.title}]({picture.name})" for picture in drawn]


def _along(result: Json) -> list[plot.Point]:
    return [(part["config"], (part["first"] + part["last"] - 1) / 2, part["kl_mean"]) for part in result["positions"]]


def _positions(measured: Sequence[Runs]) -> str:
    """KL in the first and in the last part of the answers, and between."""
    head = ["model", "context", "config", "compression", "generated", "KL along the answer", "last over first"]
    head += ["KL maximum", "ΔNLL of the last part", "documents", "source"]
    return tables.table(head, (cells for runs in measured for cells in _position_rows(runs)))


def _position_rows(runs: Runs) -> Iterator[list[object]]:
    for row in runs.first["rows"]:
        parts = [part for part in runs.first["positions"] if part["config"] == row["config"]]
        first, last = parts[0]["kl_mean"], parts[-1]["kl_mean"]
        yield [
            tables.model_name(runs.first),
            f"{row['context']:,}",
            f"`{row['config']}`",
            f"{row['compression']:.2f}x",
            f"{runs.first['decode']:,}",
            ", ".join(f"{part['kl_mean']:.4f}" for part in parts),
            f"{last / first:.2f}" if first > 0 else "not defined",
            f"{row['kl_max']:.2f}",
            tables.loss(parts[-1]),
            row["documents"],
            runs.link,
        ]


def _probes(measured: Sequence[Runs], task: str) -> str:
    """What was asked late: how much of it was right, in the order of the questions."""
    what = "code" if task == "needles" else "keys, tag"
    head = ["model", "tokens", "config", "compression at the end", f"right, in order ({what})", "in full precision"]
    head += ["sessions", "source"]
    return tables.table(head, (cells for runs in measured for cells in _probe_rows(runs)))


def _probe_rows(runs: Runs) -> Iterator[list[object]]:
    rows = runs.first["rows"]
    for config in dict.fromkeys(row["config"] for row in rows):
        own = [row for row in rows if row["config"] == config]
        yield [
            tables.model_name(runs.first),
            f"{runs.first['context']:,}",
            f"`{config}`",
            f"{own[-1]['compression']:.2f}x",
            ", ".join(f"{row['score']:.0%}" for row in own),
            ", ".join(f"{row['score_fp16']:.0%}" for row in own),
            own[0]["trials"],
            runs.link,
        ]
