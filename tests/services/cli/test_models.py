"""`qaq models` without a stack: what a router says, and what the options ask the controller for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from qaq.v1 import generate_pb2
from typer.testing import CliRunner

from services.cli import inference as module
from services.cli import models
from services.cli.main import app
from services.cluster import control


class Router:
    """Serves two models, of which one cannot be used."""

    def once(self, call: Any) -> Any:
        return call(self)

    def ListModels(self, request: Any, timeout: float) -> Any:
        broken = "the router cannot load its tokenizer: [it] is not there"
        return generate_pb2.ListModelsReply(
            models=[
                {"model": {"name": "a", "source": "/m/a", "context_length": 2048}, "workers": 2, "is_default": True},
                {"model": {"name": "b", "source": "/m/b", "context_length": 512}, "waiting": 7, "unavailable": broken},
            ]
        )


def test_all_models_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def inference(router: str | None, metadata: Any = ()) -> Iterator[Router]:
        yield Router()

    monkeypatch.setattr(module, "inference", inference)
    shown = CliRunner().invoke(app, ["models"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.replace("│", " ").split())
    assert "a (default) 2 0 2,048 /m/a" in words
    assert "b 0 7 512 /m/b" in words
    assert "the router cannot load its tokenizer: [it] is not there" in words


def test_what_is_given_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def changed(where: Any, method: str, *arguments: Any, report: Any) -> Any:
        asked.append((where, method, *arguments))
        return method == "add" and "m"

    monkeypatch.setattr(control, "_changed", changed)
    here = ("--address", "10.0.0.1:6379")
    added = CliRunner().invoke(app, ["models", "add", "owner/m", "--workers", "2", "--preset", "fp16", *here])
    assert (added.exit_code, added.stdout) == (0, "m is served.\n"), added.output
    removed = CliRunner().invoke(app, ["models", "remove", "m", *here])
    assert removed.exit_code == 0, removed.output
    assert "Streams that still ran after 600 s have ended with an error." in " ".join(removed.stdout.split())
    scaled = CliRunner().invoke(app, ["scale", "--model", "m", "--workers", "3", *here])
    assert scaled.exit_code == 0, scaled.output
    assert asked == [
        (here[1], "add", "owner/m", 2, {"preset": "fp16"}),
        (here[1], "remove", "m", models.PATIENCE_S),
        (here[1], "scale", 3, "m", None),
    ]
