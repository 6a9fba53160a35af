"""What all kinds of evaluation share: what was asked for, texts, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Config

BUILTIN = "builtin"


@dataclass(frozen=True)
class Asked:
    """What the command was told."""

    text: str = BUILTIN
    context: int = 1024
    decode: int = 128
    documents: int = 2
    offset_fraction: float = 0.0
    recall: bool = False
    turns: int = 0
    trials: int = 1
    tasks: tuple[str, ...] = ()
    task_files: dict[str, Path] = field(default_factory=dict)
    questions: int | None = None
    shots: int = 0
    window: int | None = None
    json_path: Path | None = None
    html_path: Path | None = None

    @property
    def journal(self) -> Path | None:
        """The file of finished parts."""
        return self.json_path and beside(self.json_path)


@dataclass(frozen=True)
class Outcome:
    """What was measured: the object for --json without what is said of the model, a table, a page for --html."""

    figures: dict[str, Any]
    shown: Table
    page: str | None = None


Report = Callable[[str, float | None], None]
Kind = Callable[["LoadedModel", list["Config"], Asked, Report], Outcome]


def named_text(text: str) -> tuple[str, str]:
    """A name for the text, and the text."""
    from qaq_core.base.errors import ConfigError
    from qaq_eval.quality import builtin_text

    if text == BUILTIN:
        return BUILTIN, builtin_text()
    try:
        return Path(text).name, Path(text).read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text} is not UTF-8 text ({error.reason}); give a text file, or 'builtin'") from error


def beside(path: Path) -> Path:
    """The file of finished parts."""
    return path.with_name(f"{path.name}.parts.jsonl")


def about(loaded: LoadedModel, task: str) -> dict[str, Any]:
    """What every JSON object says first."""
    return {
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "weights": loaded.weights,
        "task": task,
    }


def fits(loaded: LoadedModel, tokens: int) -> None:
    if tokens > loaded.context_length:
        raise typer.BadParameter(f"{tokens} tokens are more than the model's {loaded.context_length}")


def shown_name(config: str) -> Text:
    """A configuration's name in a table: its settings are in brackets, which are no markup."""
    return Text(config)


def empty_table(title: str, first: str, *columns: str) -> Table:
    """A table with a column of names, then columns of numbers."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    made.add_column(first, overflow="fold")
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    return made
