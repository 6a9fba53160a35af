"""Commands that start workers tell them how the model is to be computed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli import demo
from services.cli.main import app
from services.cli.terminal import starting
from services.cluster import control, roles
from services.cluster.access import Access
from services.cluster.state import StackSettings
from services.common.settings import WorkerSettings
from services.worker import server

FAST = ("--weights", "int8", "--compiled")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Settings of what would have been started."""
    seen: list[Any] = []
    access = Access(redis={"url": "", "description": "", "pid": None})

    def up(settings: StackSettings, report: Any) -> SimpleNamespace:
        seen.append(settings)
        return SimpleNamespace(router="127.0.0.1:1", gateway=None, redis={"url": ""}, access=access, certificates=None)

    async def serve(settings: WorkerSettings) -> None:
        seen.append(settings)

    def measured(*arguments: Any) -> Any:
        raise OSError("nothing runs here")

    monkeypatch.setattr(control, "up", up)
    monkeypatch.setattr(control, "attached", lambda *given: contextlib.nullcontext(up(*given)))
    monkeypatch.setattr(demo, "measure", measured)
    monkeypatch.setattr("qaq_eval.serving.serve.measure", measured)
    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setenv("QAQ_MAX_SEQUENCES", "8")  # a bench would set it for good
    return seen


@pytest.mark.parametrize("command", ["up", "demo", "bench serve", "worker"])
def test_options_win_over_the_environment(command: str, told: list[Any]) -> None:
    def run(*options: str, **environment: str) -> Any:
        CliRunner().invoke(app, [*command.split(), "--model", "m", *options], env=environment)
        return told[-1]

    variables = {"QAQ_DEVICE": "cuda:1", "QAQ_DTYPE": "bfloat16", "QAQ_PRESET": "paper"}
    plain, from_environment = run(), run(**variables)
    assert (plain.device, plain.dtype, plain.preset) == ("cpu", "auto", "balanced")
    assert (from_environment.device, from_environment.dtype, from_environment.preset) == ("cuda:1", "bfloat16", "paper")
    given = run("--device", "cpu", "--dtype", "float32", "--preset", "fp16", **variables)
    assert (given.device, given.dtype, given.preset) == ("cpu", "float32", "fp16")


def test_ports_and_bits_of_a_stack(told: list[Any]) -> None:
    variables = {"QAQ_PORT": "7701", "QAQ_HTTP_PORT": "8001", "QAQ_TARGET_BITS": "3"}
    CliRunner().invoke(app, ["up", "--model", "m"], env=variables)
    assert (told[-1].port, told[-1].http_port, told[-1].target_bits) == (7701, 8001, 3)
    options = ["--port", "0", "--http-port", "0", "--target-bits", "2"]
    CliRunner().invoke(app, ["up", "--model", "m", *options], env=variables)
    assert (told[-1].port, told[-1].http_port, told[-1].target_bits) == (0, 0, 2)


@pytest.mark.parametrize("command", ["up", "demo", "bench serve", "worker"])
def test_weights_and_compiled_steps(command: str, told: list[Any]) -> None:
    def run(*options: str, **environment: str) -> tuple[str, bool]:
        CliRunner().invoke(app, [*command.split(), "--model", "m", *options], env=environment)
        return told[-1].weights, told[-1].compiled

    assert run() == ("auto", False)
    assert run(*FAST) == ("int8", True)
    assert run(QAQ_WEIGHTS="int4", QAQ_COMPILED="true") == ("int4", True)
    assert run(*FAST, QAQ_WEIGHTS="int4") == ("int8", True)
    assert len(told) == 4
    refused = CliRunner().invoke(app, [*command.split(), "--model", "m", "--weights", "int3"])
    assert (refused.exit_code, "weights: " in refused.output, len(told)) == (1, True, 4)


def test_a_start_without_a_terminal_says_each_step_once(capsys: pytest.CaptureFixture[str]) -> None:
    with starting() as report:
        for what in ("starting", "loading [1/2]", "loading [1/2]", "ready"):
            report("worker-0", what, None)
    assert capsys.readouterr().err.splitlines() == [
        "worker-0: starting",
        "worker-0: loading [1/2]",
        "worker-0: ready",
    ]


def test_a_stacks_workers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_WEIGHTS", "int4")
    access = Access(redis={"url": "redis://127.0.0.1", "description": "", "pid": None})
    told = [
        roles.plan(settings, access).worker
        for settings in (StackSettings(model="m"), StackSettings(model="m", weights="bfloat16", compiled=True))
    ]
    assert [(worker.weights, worker.compiled) for worker in told] == [("auto", False), ("bfloat16", True)]
