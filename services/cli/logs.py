"""`qaq logs`: what the servers of the stack of this machine have written down."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.terminal import screen, size


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Stack")(logs)


def logs(
    server: Annotated[
        str | None, typer.Argument(help="Such as worker-0; default: a list of those that there are.")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 100,
) -> None:
    """Shows the log of a server of this machine's stack, also after it has crashed or `qaq down` has stopped it.

    A server keeps its log until the stack after the next one starts, at most 8 MB of it.
    """
    from services.cluster import logs
    from services.cluster.state import StackError

    found = logs.found()
    if server is None:
        if not found:
            raise StackError(f"there are no logs in {logs.folder()}; `qaq up` starts a stack that writes some")
        for name, paths in found.items():
            screen.print(f"{name}: {size(sum(path.stat().st_size for path in paths))}, {paths[-1]}", soft_wrap=True)
        return
    if server not in found:
        raise StackError(f"there is no log of {server}; there are {', '.join(found) or 'none'}")
    for line in logs.tail(found[server], lines):
        typer.echo(line)
