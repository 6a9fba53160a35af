"""What all kinds of evaluation share: options, output, texts, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from services.cli.terminal import screen

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Config

BUILTIN = "builtin"


@dataclass(frozen=True)
class EvalOptions:
    """The options of `qaq eval`."""

    text: str = BUILTIN
    context: int = 1024
    decode: int = 128
    documents: int = 2
    offset_fraction: float = 0.0
    recall: bool = False
    turns: int = 0
    needles: int = 0
    formats: int = 0
    trials: int = 1
    tasks: tuple[str, ...] = ()
    task_files: dict[str, Path] = field(default_factory=dict)
    questions: int | None = None
    shots: int = 0
    window: int | None = None
    json_path: Path | None = None
    html_path: Path | None = None

    @property
    def window_fact(self) -> dict[str, int]:
        """The residual window, if one was asked for: a fact of the run."""
        return {} if self.window is None else {"window": self.window}

    @property
    def journal(self) -> Path | None:
        """The journal of finished work."""
        return self.json_path and journal_path(self.json_path)


@dataclass(frozen=True)
class EvalOutput:
    """The output of an evaluation: the object for --json, a table for the terminal, and a page for --html."""

    json: dict[str, Any]
    table: Table
    page: str | None = None


Report = Callable[[str, float | None], None]
Kind = Callable[["LoadedModel", list["Config"], EvalOptions, Report], EvalOutput]


def read_text(text: str) -> tuple[str, str]:
    """The name of a text, and the text.

    Raises:
        ConfigError: the file is not UTF-8 text.
    """
    from qaq_core.base.errors import ConfigError
    from qaq_eval.quality import builtin_text

    if text == BUILTIN:
        return BUILTIN, builtin_text()
    try:
        return Path(text).name, Path(text).read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text} is not UTF-8 text ({error.reason}); give a text file, or 'builtin'") from error


def journal_path(path: Path) -> Path:
    """The journal beside a JSON file."""
    return path.with_name(f"{path.name}.parts.jsonl")


def about_model(loaded: LoadedModel, task: str) -> dict[str, Any]:
    """The first fields of every JSON object."""
    return {
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "weights": loaded.weights,
        "task": task,
    }


def check_length(loaded: LoadedModel, tokens: int) -> None:
    """Raises typer.BadParameter if the model's context is shorter than `tokens`."""
    if tokens > loaded.context_length:
        raise typer.BadParameter(f"{tokens} tokens exceed the model's context of {loaded.context_length}")


def config_cell(config: str) -> Text:
    """A configuration's name for a table. Its brackets are not markup."""
    return Text(config)


def empty_table(title: str, first: str, *columns: str) -> Table:
    """A table with a column of names, followed by columns of numbers."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def show_table(table: Table) -> None:
    """Prints a table whole. A terminal that is narrower wraps its lines; no name or number is cut."""
    unbounded = screen.options.update(max_width=1000)
    table.width = max(screen.width, screen.measure(table, options=unbounded).maximum)
    screen.print(table, crop=False, highlight=False)
