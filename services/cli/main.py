"""All commands, and how their errors are told."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from services.cli import (
    calibrate,
    client,
    demo,
    doctor,
    estimate,
    keys,
    logs,
    models,
    roles,
    secrets,
    stack,
    status,
    tokenizer,
    top,
)
from services.cli.terminal import errors
from services.common.extras import advice


class Polite(TyperGroup):
    """Ends a command that failed in a foreseen way with one sentence and exit code 1, and by Ctrl-C with 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            errors.print("\ninterrupted")  # behind ^C, or a text that is cut off
            raise typer.Exit(130) from error
        except Exception as error:
            sentence = _sentence(error)
            if sentence is None:
                raise
            errors.print(f"[bold red]error:[/] {sentence}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from error


def _sentence(error: Exception) -> str | None:
    """What to tell about an error; None for one that was not foreseen."""
    from rich.markup import escape

    from qaq_core.base.errors import QAQError

    if isinstance(error, ModuleNotFoundError):
        missing = advice(error)
        return missing and escape(missing)
    if isinstance(error, QAQError | OSError):
        return escape(str(error))
    try:
        import grpc
        from pydantic import ValidationError
        from redis.exceptions import RedisError

        from services.common.environment import known, variable
        from services.common.errors import StatusError
    except ModuleNotFoundError:
        return None

    if isinstance(error, StatusError):
        return escape(error.message)
    if isinstance(error, grpc.RpcError):
        if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in (error.details() or ""):
            return (
                "no server of QAQ answers there; start a stack with `qaq up`, correct the address (`qaq status` shows "
                "them), or set QAQ_TLS_CA, QAQ_TLS_CERT and QAQ_TLS_KEY if it asks for a certificate"
            )
        return escape(f"{error.details()} ({error.code().name})")
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        by = f" or by {variable(name)}" if variable(name) in known() else ""
        wrong = first["msg"].removeprefix("Value error, ")
        return escape(f"{name}: {wrong}; set it by its option{by}")
    if isinstance(error, RedisError):
        return escape(f"Redis does not answer ({error}); start it, or check QAQ_REDIS_URL")
    return None


app = typer.Typer(
    cls=Polite,
    name="qaq",
    help="Serve language models from a quality-adaptive quantized KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for module in (
    demo,
    doctor,
    stack,
    models,
    status,
    top,
    logs,
    client,
    keys,
    roles,
    secrets,
    calibrate,
    estimate,
    tokenizer,
):
    module.register(app)
# Packages that are installed beside this one add commands of their own.
for plugin in entry_points(group="qaq.commands"):
    plugin.load()(app)
