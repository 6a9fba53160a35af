"""The plots of KL over resident bytes and along answers, as SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from tools.results.runs import Json

Point = tuple[str, float, float]
LABELS = {"kivi-2": (-34, 4), "uniform-3": (7, -3), "hadamard-3": (7, -10), "kivi-4": (7, -3)}
"""Where labels that would meet another one are put, in points."""


def points(rows: Sequence[Json]) -> list[Point]:
    """Configuration, resident bytes in percent of fp16, KL in nats per token.

    Without re-quantization the points lie where those with it lie, so they are left out.
    """
    shown = (row for row in rows if "-norequant" not in row["config"])
    return [(row["config"], 100 / row["compression"], row["kl_mean"]) for row in shown]


def description(drawn: Sequence[Point]) -> str:
    """What the file says of its points: with it drift is found without drawing again."""
    return "; ".join(f"{config} {size:.3f}% {kl:.5f}" for config, size, kl in drawn)


def is_current(path: Path, drawn: Sequence[Point]) -> bool:
    return path.exists() and f"<dc:description>{description(drawn)}</dc:description>" in path.read_text("utf-8")


def draw(
    path: Path, drawn: Sequence[Point], title: str, limits: tuple[float, float] | None = (8, 40), along: bool = False
) -> None:
    """Writes the plot. Configurations of one method are joined by a line.

    Args:
        limits: of the horizontal axis; by the points if None.
        along: the points lie along answers, those of one configuration joined: its second part is a token's number.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    methods: dict[str, list[Point]] = {}
    for point in drawn:
        methods.setdefault(point[0] if along else re.split(r"[@\d]|-\d", point[0])[0], []).append(point)
    others = cycle([*matplotlib.color_sequences["Dark2"], *matplotlib.color_sequences["tab10"]])
    for method, mine in methods.items():
        colour, style = ("tab:red", "o-") if method == "balanced" else (next(others), "s--")
        axes.plot([x for _, x, _ in mine], [y for *_, y in mine], style, color=colour)
        for config, x, y in mine[-1:] if along else mine:
            place = LABELS.get(config, (7, 3))
            axes.annotate(config, (x, y), place, textcoords="offset points", fontsize=9, color=colour)
    across = "generated tokens" if along else "resident bytes, % of fp16, everything counted"
    axes.set(yscale="log", xlabel=across, ylabel="KL, nats per token", title=title)
    if limits is not None:
        axes.set(xlim=limits)
    axes.grid(alpha=0.3, which="both")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qaq"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": description(drawn)})
