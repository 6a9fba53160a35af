"""What a deployment's servers know each other by: certificates, and the users of Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from services.cli.terminal import screen

Output = Annotated[Path, typer.Option("--output", help="The directory to write to.")]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Roles")(certificates)
    app.command("redis-users", rich_help_panel="Roles")(redis_users)


def certificates(
    output: Output,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="A host name or address at which a role is found; repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificates hold.")] = 365,
) -> None:
    """Makes a CA and a directory for each role with its certificate, or new certificates of the CA that is there."""
    from services.common.certificates import issue
    from services.common.roles import ROLES, Role

    hosts: list[tuple[Role, str]] = []
    for pair in host or ():
        role, _, name = pair.partition("=")
        if role not in ROLES or not name:
            raise typer.BadParameter(f"give ROLE=NAME with a role of {', '.join(ROLES)}", param_hint="--host")
        hosts.append((cast(Role, role), name))
    issue(output, hosts, days)
    screen.print(f"The certificates are in {output}. Give each server its own directory, and nobody ca-key.pem.")


def redis_users(
    output: Output,
    url: Annotated[str, typer.Option(help="Redis' URL without a user.")] = "rediss://redis:6379/0",
    redis_version: Annotated[str, typer.Option(help="Redis' version; below 7 some rights are wider.")] = "8",
) -> None:
    """Chooses passwords: redis/users.acl for Redis, and <role>/redis.env with QAQ_REDIS_URL for each role."""
    from services.common.redis_users import write

    version = tuple(int(part) for part in redis_version.split(".") if part.isdigit())
    write(output, url, version)
    screen.print(f"Redis' users are in {output}. Give Redis users.acl, and each role its own redis.env.")
