"""`qaq key`, and the key of a command's calls."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.terminal import errors

if TYPE_CHECKING:
    from services.common.tenants import Role

Limit = Annotated[int | None, typer.Option(min=1, show_default="unbounded")]


def register(app: typer.Typer) -> None:
    app.command()(key)


def key(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant: letters, digits, '.', '_' and '-'.")],
    file: Annotated[
        Path | None,
        typer.Option(envvar="QAQ_TENANTS_FILE", help="The tenants file. Default: that of this machine's stack."),
    ] = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="The tenant may list and close the sessions of all tenants.")
    ] = False,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent_streams: Limit = None,
    open_sessions: Limit = None,
    replace: Annotated[bool, typer.Option("--replace", help="Remove the tenant's other keys.")] = False,
) -> None:
    """Makes a key for a tenant, adds its hash to the tenants file, and prints it once.

    Routers read the file again within a second.
    """
    from services.cluster import state
    from services.cluster.keys import StackKeys
    from services.common.tenants import Quotas, add_key

    path = file or StackKeys(state.directory()).tenants
    quotas = Quotas.model_validate(
        {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "concurrent_streams": concurrent_streams,
            "open_sessions": open_sessions,
        }
    )
    made = add_key(path, tenant, role="operator" if operator else None, quotas=quotas, replace=replace)
    errors.print(f"A key of {tenant}; {path} has its hash alone, so keep it:", soft_wrap=True, highlight=False)
    typer.echo(made)


def caller_key(router: str | None, role: Role = "client") -> str:
    """QAQ_API_KEY, or a key of the stack that runs on this machine, for calls to that stack alone.

    Args:
        router: the routers that are called; None for those of the stack.
        role: whose key of the stack's.
    Returns:
        The key; empty if there is none.
    """
    from services.cluster import state
    from services.cluster.keys import StackKeys
    from services.cluster.state import StackError

    if (given := os.environ.get("QAQ_API_KEY")) is not None:
        return given
    with contextlib.suppress(StackError, OSError):  # a damaged state is told where the stack is looked for
        running = state.load()
        if running is not None and running.keys is not None and running.alive and router in (None, running.router):
            return StackKeys(running.keys).key(role)
    return ""
