"""What commands share of the terminal: consoles, progress displays, sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

screen = Console()
errors = Console(stderr=True)

Report = Callable[[str, str, float | None], None]


@contextlib.contextmanager
def starting() -> Iterator[Report]:
    """A line for each thing that starts: what it does, and how far it is. Without a terminal, one for each step.

    What is reported after the context is a line, too.
    """
    if not errors.is_terminal:
        yield _plain()
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.fields[who]:<12}"),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        lines: dict[str, TaskID] = {}
        plain = _plain()

        def report(who: str, what: str, done: float | None) -> None:
            if not progress.live.is_started:  # what is said after the start, such as that it is stopped
                plain(who, what, done)
                return
            if who not in lines:
                lines[who] = progress.add_task(what, total=None, who=who)
            progress.update(lines[who], description=what, total=1.0 if done is not None else None, completed=done or 0)

        yield report


def _plain() -> Report:
    last: dict[str, str] = {}

    def report(who: str, what: str, done: float | None) -> None:
        if last.get(who) != what:
            last[who] = what
            errors.print(f"{who}: {what}", markup=False, highlight=False, soft_wrap=True)

    return report


def warn_of_environment(*, stack: bool = False) -> None:
    """Warns of variables that mean nothing to QAQ, or nothing to a stack."""
    import os

    from services.common import environment

    said = [environment.told(name, meant) for name, meant in environment.unknown().items()]
    if stack and "QAQ_METRICS_PORT" in os.environ:
        said.append("QAQ_METRICS_PORT means nothing to a stack; its gateway lists all metrics at /metrics/targets")
    for sentence in said:
        errors.print(f"[yellow]warning:[/] {sentence}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str, float | None], None]]:
    """One bar of all that there is to do: (what, share done or None)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        line = progress.add_task("loading", total=None)

        def report(what: str, share: float | None) -> None:
            progress.update(line, description=what, completed=share or 0, total=None if share is None else 1.0)

        yield report


def size(count: int | float) -> str:
    """ "3.2 MB" of a number of bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
