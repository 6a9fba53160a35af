"""The commands of the laboratory: `qaq eval`, `qaq paper`, `qaq bench`."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Adds the commands; found by the entry point "qaq.commands"."""
    from qaq_eval.cli import bench, eval, paper

    for module in (eval, paper, bench):
        module.register(app)
