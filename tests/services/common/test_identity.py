"""Where a server may do without TLS, and what makes certificates."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from qaq_core.base.errors import ConfigError
from services.common.certificates import files, issue
from services.common.identity import is_loopback
from services.common.server_identity import identity
from services.common.settings import CommonSettings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_tls(host: str) -> None:
    assert is_loopback(host)
    assert identity(CommonSettings(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker-1"])
def test_a_network_needs_it(host: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no TLS: set QAQ_TLS_CERT.*or QAQ_INSECURE=1"):
        identity(CommonSettings(host=host))
    with capture_logs() as logs:
        assert identity(CommonSettings(host=host, insecure=True)) is None
    assert [entry["log_level"] for entry in logs] == ["warning"]


def test_redis_on_another_machine_needs_it() -> None:
    settings: dict[str, Any] = {"redis_url": "redis://:hidden@10.0.0.1:6379/0"}
    with pytest.raises(ConfigError, match=r"Redis is at 10\.0\.0\.1 without rediss://") as caught:
        identity(CommonSettings(**settings))
    assert "hidden" not in str(caught.value)
    assert identity(CommonSettings(**settings, insecure=True)) is None
    assert identity(CommonSettings(redis_url="rediss://10.0.0.1:6379/0")) is None  # type: ignore[arg-type]


def test_the_files_belong_together(tmp_path: Path) -> None:
    issue(tmp_path)
    ca, cert, key = files(tmp_path, "worker")
    with pytest.raises(ConfigError, match="set QAQ_TLS_CA, QAQ_TLS_KEY too"):
        identity(CommonSettings(tls_cert=cert))
    found = identity(CommonSettings(tls_cert=cert, tls_key=key, tls_ca=ca, host="0.0.0.0"))
    assert found is not None
    assert found.pems.cert == cert.read_bytes()


def test_keys_are_private_and_a_renewal_keeps_the_ca(tmp_path: Path) -> None:
    directory = tmp_path / "made"
    issue(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    keys = [*directory.rglob("*key.pem")]
    assert len(keys) == 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    ca, cert, _ = files(directory, "worker")
    before = ca.read_bytes(), cert.read_bytes()
    issue(directory)
    assert ca.read_bytes() == before[0]
    assert cert.read_bytes() != before[1]
    (directory / "ca-key.pem").unlink()
    with pytest.raises(ConfigError, match="no CA with its key"):
        issue(directory)
