"""Commands that make certificates and passwords, and who a command is when it calls a server."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from typer.testing import CliRunner

from qaq_core.base.errors import ConfigError
from services.cli.identity import identity
from services.cli.main import app
from services.cluster import state
from services.cluster.state import StackSettings, StackState
from services.common.certificates import files, issue


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_certificates(tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert run("certificates", "--output", made, "--host", "router=llm.example.com", "--host", "redis=10.1.2.3")[0] == 0
    names = {}
    for role in ("router", "worker", "redis"):
        certificate = x509.load_pem_x509_certificate((made / role / "cert.pem").read_bytes())
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names[role] = {str(name.value) for name in found}
    assert {"llm.example.com", "router.qaq.internal", "qaq://role/router", "127.0.0.1"} <= names["router"]
    assert {"10.1.2.3", "redis"} <= names["redis"]
    assert names["worker"] == {"qaq://role/worker", "worker.qaq.internal", "any.qaq.internal", "worker"}
    code, said = run("certificates", "--output", made, "--host", "king=x")
    assert (code, "give ROLE=NAME with a role of router, worker" in said) == (2, True)


def test_redis_users(tmp_path: Path) -> None:
    assert run("redis-users", "--output", tmp_path, "--url", "redis://cache:6379/1")[0] == 0
    assert (tmp_path / "gateway" / "redis.env").read_text().startswith("QAQ_REDIS_URL=redis://gateway:")
    code, said = run("redis-users", "--output", tmp_path)
    assert (code, "remove it to choose new passwords" in said) == (1, True)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))
    issue(tmp_path / "tls")
    return tmp_path / "tls"


def test_a_command_is_who_the_environment_says(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity("127.0.0.1:7700") is None
    ca, cert, key = files(place, "client")
    monkeypatch.setenv("QAQ_TLS_CA", str(ca))
    assert (found := identity("127.0.0.1:7700")) is not None
    assert found.pems.cert is None
    monkeypatch.setenv("QAQ_TLS_CERT", str(cert))
    with pytest.raises(ConfigError, match="belong together"):
        identity()
    monkeypatch.setenv("QAQ_TLS_KEY", str(key))
    assert (found := identity()) is not None
    assert found.pems.cert == cert.read_bytes()


def test_a_command_is_the_operator_of_the_stack_that_runs(place: Path) -> None:
    running = StackState.model_validate(
        {
            "settings": StackSettings(model="m"),
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
            "router": "127.0.0.1:1",
            "ray_address": "127.0.0.1:2",
            "directory": "/tmp/none",
            "redis": {"url": "redis://127.0.0.1:9/0", "description": "d", "pid": None},
            "certificates": place,
        }
    )
    state.save(running)
    assert state.ca().read_bytes() == (place / "ca.pem").read_bytes()
    for servers in (None, "127.0.0.1:1", "10.0.0.1:7700, 127.0.0.1:1"):
        assert (found := identity(servers)) is not None
        assert found.cert == place / "operator" / "cert.pem"
    assert identity("127.0.0.1:3") is None  # of somebody else
    state.forget()
    assert not state.ca().exists()
    assert identity() is None
