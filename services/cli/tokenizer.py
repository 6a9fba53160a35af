"""`qaq tokenizer`: the files of a model's tokenizer, for programs that count tokens themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.client import DEADLINE_S, Router
from services.cli.options import Model, model_or_default
from services.cli.terminal import screen


def register(app: typer.Typer) -> None:
    app.command()(tokenizer)


def tokenizer(
    output: Annotated[Path, typer.Option(help="Directory to write; it may not have files yet.")],
    model: Model = None,
    router: Router = None,
) -> None:
    """Writes a tokenizer's files to a directory, also those of a GGUF file's, as load clients need them.

    Without --model, the tokenizer is that of the model which the router serves.
    """
    from qaq_core.base.errors import ConfigError
    from qaq_core.models import avoid_torch, load_tokenizer

    avoid_torch()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} has files already; name another directory")
    source = _served(router) if model is None else model_or_default(model)
    written = load_tokenizer(source).save_pretrained(output)
    screen.print(f"{len(written)} files of {source} are in {output}", soft_wrap=True, highlight=False)


def _served(router: str | None) -> str:
    """Where the router's model comes from."""
    from qaq.v1 import generate_pb2

    from services.cli.inference import inference

    with inference(router) as asked:
        reply = asked.once(lambda stub: stub.GetModel(generate_pb2.GetModelRequest(), timeout=DEADLINE_S))
    return str(reply.model.source)
