"""The commands of the evaluation: `qaq eval`, `qaq paper`, `qaq bench`."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Adds the commands. The entry point "qaq.commands" names this function."""
    from qaq_eval.cli import bench, eval, paper

    for module in (eval, paper, bench):
        module.register(app)
