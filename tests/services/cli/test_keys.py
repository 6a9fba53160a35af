"""`qaq key`, and which key commands send to whom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from services.cli.keys import caller_key
from services.cli.main import app
from services.cluster import state
from services.cluster.keys import StackKeys
from services.cluster.state import StackSettings, StackState
from services.common import tenants
from services.common.tenants import Quotas


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("QAQ_API_KEY", "QAQ_TENANTS_FILE", "QAQ_ROUTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["key", *arguments])


def test_a_key_is_printed_once_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "tenants.json"
    made = run(
        *("acme", "--file", str(path), "--requests-per-minute", "60", "--tokens-per-minute", "9000"),
        *("--concurrent-streams", "4", "--open-sessions", "8"),
    )
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert key.startswith("qaq_")
    assert " " not in key
    assert str(path) in made.stderr
    assert key not in made.stderr
    (acme,) = tenants.load(path).tenants
    assert acme.keys == (tenants.hashed(key),)
    assert acme.quotas == Quotas(requests_per_minute=60, tokens_per_minute=9000, concurrent_streams=4, open_sessions=8)
    assert run("acme", "--file", str(path), "--replace").exit_code == 0
    assert tenants.load(path).tenants[0].keys != acme.keys
    assert run("boss", "--file", str(path), "--operator").exit_code == 0
    assert tenants.load(path).tenants[1].role == "operator"


def test_without_a_file_it_is_that_of_this_machines_stack(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("acme").exit_code == 0
    assert [each.name for each in tenants.load(place / "tenants.json").tenants] == ["acme"]
    monkeypatch.setenv("QAQ_TENANTS_FILE", str(place / "other.json"))
    assert run("acme").exit_code == 0
    assert (place / "other.json").exists()


def test_what_cannot_be_made_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tenants.json"
    path.write_text("{")
    for arguments, told in ((("acme", "--file", str(path)), "is not valid"), (("a b",), "name: ")):
        refused = run(*arguments)
        assert refused.exit_code == 1
        assert told in refused.output
        assert "Traceback" not in refused.output


def running(keys: Path | None) -> StackState:
    stack = StackState(
        settings=StackSettings(model="m"),
        pid=os.getpid(),
        born=psutil.Process().create_time(),
        router="127.0.0.1:7700",
        ray_address="127.0.0.1:2",
        directory=Path("/tmp/none"),
        redis={"url": "redis://127.0.0.1:3/0", "description": "d", "pid": None},
        keys=keys,
    )
    state.save(stack)
    return stack


def test_a_command_sends_the_stacks_key_to_the_stack_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert caller_key(None) == ""
    StackKeys(place).make()
    stack = running(place)
    client = StackKeys(place).key("client")
    assert (caller_key(None), caller_key("127.0.0.1:7700"), caller_key("10.0.0.1:7700")) == (client, client, "")
    assert caller_key("127.0.0.1:7700,10.0.0.1:7700") == ""
    assert (stack.key("client"), stack.key("operator")) == (client, StackKeys(place).key("operator"))
    monkeypatch.setenv("QAQ_API_KEY", "mine")
    assert (caller_key(None), caller_key("10.0.0.1:7700")) == ("mine", "mine")
    assert stack.key("client") == client
    monkeypatch.delenv("QAQ_API_KEY")
    running(None)
    assert (caller_key(None), running(None).key("client")) == ("", "")
    state.forget()
    (place / "stack.json").write_text("{")
    assert caller_key("127.0.0.1:7700") == ""
