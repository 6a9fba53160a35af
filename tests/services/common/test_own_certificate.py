"""A server does not start with a certificate that its callers would refuse, and says why."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from structlog.testing import capture_logs
from typer.testing import CliRunner

from qaq_core.base.errors import ConfigError
from services.cli.main import app
from services.common import certificates
from services.common.certificates import files, issue
from services.common.identity import Identity
from services.common.own_certificate import check_own
from services.common.server_identity import identity
from services.common.settings import CommonSettings, GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings

SETTINGS: dict[str, type[CommonSettings]] = {
    "router": RouterSettings,
    "worker": WorkerSettings,
    "originals": OriginalsSettings,
    "gateway": GatewaySettings,
}


def started(directory: Path, role: str, shown: str, ca: Path | None = None) -> Identity | None:
    """What a server of a role makes of the certificate of another, or its own."""
    own_ca, cert, key = files(directory, shown)  # type: ignore[arg-type]
    given: dict[str, Any] = {"tls_ca": ca or own_ca, "tls_cert": cert, "tls_key": key}
    return identity(SETTINGS[role](**given, **({"model": "m"} if role in ("router", "worker") else {})))


@pytest.mark.parametrize("role", SETTINGS)
def test_its_own_is_accepted_and_no_other(role: str, tmp_path: Path) -> None:
    issue(tmp_path)
    assert started(tmp_path, role, role) is not None
    for other in {*SETTINGS, "client", "operator", "redis"} - {role}:
        with pytest.raises(ConfigError, match=f"is of the role {other}, and this is a server of the role {role}; set"):
            started(tmp_path, role, other)


def test_another_ca(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        issue(tmp_path / name)
    with pytest.raises(ConfigError, match=r"would be refused by everybody who trusts .*local issuer"):
        started(tmp_path / "ours", "worker", "worker", tmp_path / "theirs" / "ca.pem")
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join((tmp_path / name / "ca.pem").read_bytes() for name in ("theirs", "ours")))
    assert started(tmp_path / "ours", "worker", "worker", both) is not None


def test_one_that_does_not_hold_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issue(tmp_path)
    monkeypatch.setattr(certificates, "_BACKDATED", -timedelta(hours=1))
    issue(tmp_path)
    with pytest.raises(ConfigError, match=r"cert\.pem holds from .* on; set this machine's clock"):
        started(tmp_path, "worker", "worker")


def test_one_that_is_for_clients_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clients(x509.ExtendedKeyUsage):
        def __init__(self, usages: object) -> None:
            super().__init__([ExtendedKeyUsageOID.CLIENT_AUTH])

    monkeypatch.setattr(x509, "ExtendedKeyUsage", Clients)
    issue(tmp_path)
    with pytest.raises(ConfigError, match=r"would be refused .*purpose"):
        started(tmp_path, "worker", "worker")


def test_one_without_the_names_of_a_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "uri", lambda role: f"https://{role}")
    issue(tmp_path)
    with pytest.raises(ConfigError, match="names no role of QAQ"):
        started(tmp_path, "worker", "worker")
    monkeypatch.undo()
    monkeypatch.setattr(certificates, "server_name", lambda role: "elsewhere.example.com")
    issue(tmp_path)
    with pytest.raises(ConfigError, match=r"would be refused .*Hostname mismatch"):
        started(tmp_path, "worker", "worker")


def test_any_role_will_do_where_none_is_asked_for(tmp_path: Path) -> None:
    issue(tmp_path)
    check_own(Identity(*files(tmp_path, "router")), None)


def test_the_command_ends_with_a_sentence(tmp_path: Path) -> None:
    issue(tmp_path)
    ca, cert, key = (str(path) for path in files(tmp_path, "worker"))
    variables = {"QAQ_TLS_CA": ca, "QAQ_TLS_CERT": cert, "QAQ_TLS_KEY": key, "QAQ_REDIS_URL": "redis://127.0.0.1:9"}
    result = CliRunner().invoke(app, ["originals"], env=variables)
    said = " ".join(result.output.split())
    assert (result.exit_code, "is of the role worker, and this is a server of the role originals" in said) == (1, True)


def test_a_key_that_everybody_may_read_is_told_once(tmp_path: Path) -> None:
    issue(tmp_path)
    key = files(tmp_path, "worker")[2]
    with capture_logs() as logs:
        started(tmp_path, "worker", "worker")
        assert logs == []
        key.chmod(stat.S_IMODE(key.stat().st_mode) | stat.S_IROTH)
        for _ in range(3):
            started(tmp_path, "worker", "worker")
    assert [(entry["log_level"], entry["advice"]) for entry in logs] == [("warning", f"chmod o-r {key}")]
