"""Settings of a stack's roles, and what is refused before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr
from typer.testing import CliRunner

from qaq_core.models.default_model import default_model_path
from services.cli.main import app
from services.cluster import control, roles
from services.cluster.state import StackError, StackSettings

WHO = {"redis_url": SecretStr("redis://127.0.0.1")}


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(*arguments: Any, **more: Any) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(control, "_spawn", start)
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))


def up(*options: str, **environment: str) -> str:
    """The error of `qaq up`."""
    shown = CliRunner().invoke(app, ["up", "--port", "0", *options], env={"COLUMNS": "300"} | environment)
    assert shown.exit_code in (1, 2), shown.output
    assert not isinstance(shown.exception, AssertionError)
    return " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("QAQ_MAX_SEQUENCES", "none", "max_sequences: "),
        ("QAQ_PAGE_TOKENS", "0", "page_tokens: "),
        ("QAQ_PAGE_TTL_S", "1", "page_ttl_s: "),
        ("QAQ_PRESET", "zip", "preset: "),
        ("QAQ_DEVICE", "tpu", "take cpu, cuda or cuda:N"),
        ("QAQ_DTYPE", "int3", "dtype: "),
        ("QAQ_TARGET_BITS", "many", "QAQ_TARGET_BITS"),
        ("QAQ_PLACEMENT", "random", "placement policy 'random' is unknown"),
        ("QAQ_KERNEL", "quick", "QAQ_KERNEL must be one of"),
        ("QAQ_LOG_LEVEL", "loud", "log_level: "),
        ("QAQ_HOST", "10.255.255.1", "set QAQ_HOST"),
        ("QAQ_MODEL", "a model/of nobody", "is not there; give"),
        ("QAQ_MODEL", "/nowhere/model.gguf", "is not there; give"),
    ],
)
def test_a_bad_variable_is_told_before_anything_starts(name: str, value: str, words: str) -> None:
    assert words in up(**{name: value})


def test_models_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    options = [part for folder in ("one", "two") for part in ("--model", str(tmp_path / folder / "m.gguf"))]
    assert 'two of the models have the name "m"' in up(*options)


def test_the_files_of_each_model_are_looked_for(tmp_path: Path) -> None:
    assert "second.gguf' is not there" in up("--model", str(default_model_path()), "--model", "/no/second.gguf")


def test_smg_sends_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "require", lambda module: None)  # installed or not
    assert "SMG sends no keys; add --no-keys, or unset QAQ_SMG" in up(QAQ_SMG="1")


def test_bad_settings_of_a_gateway_matter_where_there_is_one() -> None:
    assert "max_body_bytes: " in up("--http-port", "0", QAQ_MAX_BODY_BYTES="0")


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} is taken; choose another with --http-port" in up("--http-port", port)
    assert "are both 7711" in up("--port", "7711", "--http-port", "7711")


def test_a_port_of_another_address_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))
        taken.listen()
        settings = StackSettings(model="m", port=taken.getsockname()[1])
        roles.check_ports(settings)
        monkeypatch.setenv("QAQ_HOST", "127.0.0.2")
        with pytest.raises(StackError, match="is taken"):
            roles.check_ports(settings)


def test_unknown_variables_are_told() -> None:
    told = up(QAQ_PRESSET="paper", QAQ_METRICS_PORT="9000", QAQ_PAGE_TOKENS="0")
    assert "QAQ_PRESSET means nothing to QAQ; did you mean QAQ_PRESET?" in told
    assert "QAQ_METRICS_PORT means nothing to a stack" in told


def test_other_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_MAX_SEQUENCES", "3")
    monkeypatch.setenv("QAQ_REQUANTIZE_WAIT", "true")
    monkeypatch.setenv("QAQ_SESSION_TTL_S", "60")
    monkeypatch.setenv("QAQ_PORT", "1")  # of a role alone
    settings = StackSettings(model="m", port=0, http_port=0, dtype="float32")
    worker = roles.worker(settings, WHO)
    assert (worker.max_sequences, worker.requantize_wait, worker.dtype, worker.port) == (3, True, "float32", 0)
    router, gateway = roles.router(settings, WHO), roles.gateway(settings, WHO)
    assert (router.session_ttl_s, router.port, gateway and gateway.port) == (60, 0, 0)
    assert roles.originals(WHO).port == 0
    assert roles.gateway(StackSettings(model="m"), WHO) is None


@pytest.mark.parametrize(
    ("options", "there", "words"),
    [
        (["--device", "cuda"], 0, "error: cuda is not there: torch sees 0 CUDA devices; take cpu"),
        (["--device", "cuda:1"], 2, "chooses its workers' devices itself: take cuda, not cuda:1"),
        (["--device", "cuda", "--workers", "3"], 2, "3 workers need a CUDA device each, and there are 2"),
    ],
)
def test_devices_are_there_before_anything_starts(
    options: list[str], there: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert words in up(*options)


@pytest.mark.parametrize("command", ["demo", "worker", "eval", "bench decode", "calibrate"])
def test_every_command_says_at_once_that_a_device_is_not_there(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, and before it looks for Redis."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shown = CliRunner().invoke(
        app, [*command.split(), "--device", "cuda"], env={"COLUMNS": "300", "QAQ_REDIS_URL": "redis://127.0.0.1:9"}
    )
    assert shown.exit_code == 1, shown.output
    last = shown.output.strip().splitlines()[-1]
    assert last == "error: cuda is not there: torch sees 0 CUDA devices; take cpu"
