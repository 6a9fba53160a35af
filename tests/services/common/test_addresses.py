"""Addresses and URLs that cannot be are told in one sentence, by every setting and command that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from qaq_core.base.errors import ConfigError
from services.cli.main import app
from services.common.addresses import check_addresses, check_host
from services.common.redis_url import check_redis_url
from services.common.routers import named

URLS = {
    "redis://h:port/0": "its port is no number",
    "redis://h:70000/0": "its port is no number",
    "redis://:hidden/1@h:6379/0": "must be percent-encoded",
    "http://h:6379": "must begin with redis:// or rediss://",
    "h:6379": "must begin with redis:// or rediss://",
    "redis://h:6379/zero": "the number of a database",
    "redis://h?colour=red": "does not know one of its options: colour",
    "redis://h?socket_timeout=soon": "does not know one of its options: socket_timeout",
    "rediss://h?ssl_ca_certs=/none.pem": "/none.pem is not there",
    "redis+cluster://h:6379": "Redis Cluster cannot be used",
    "redis+sentinel://h:26379": "the name of their service",
    "redis+sentinel://h:26379/mymaster/zero": "the number of a database",
    "redis+sentinel://h:26379,g:port/mymaster": "is no host:port",
    "redis+sentinel://:hidden/1@h:26379/mymaster": "must be percent-encoded",
    "redis+sentinel://h/mymaster?colour=red": "no option colour",
    "rediss+sentinel://h/mymaster?ssl_ca_certs=/none.pem": "/none.pem is not there",
}


@pytest.mark.parametrize("url", URLS)
def test_urls_that_redis_client_cannot_use(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_redis_url(url)
    assert URLS[url] in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_urls_that_it_can_use(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    for url in (
        *("redis://h", "redis://u:p%2F@h:6379/3", "redis://[::1]:6379", f"rediss://h/0?ssl_ca_certs={ca}"),
        *("redis+sentinel://a,b:1/m", "rediss+sentinel://u:p%40@[::1]:26379,[::2]/m/3?sentinel_password=x"),
    ):
        assert check_redis_url(url) == url


def test_hosts() -> None:
    for host in ("127.0.0.1", "::1", "[::1]", "0.0.0.0", "worker-1", "a_b.example.com", "localhost"):
        assert check_host(host) == host
    for host in ("", "http://a", "a:7700", "a b", "a/b", "-a", "a" * 300):
        with pytest.raises(ConfigError, match="is no host name or IP address; give it without"):
            check_host(host)


def test_lists() -> None:
    assert check_addresses("a:1, [::1]:7700") == ["a:1", "[::1]:7700"]
    for listed in ("", "a", "a:", ":1", "a:0", "a:65536", "a:1,", "::1:7700", "http://a:1", "a:one"):
        with pytest.raises(ConfigError, match=r"give (host:port|it without)"):
            check_addresses(listed)
        with pytest.raises(ConfigError):
            named(listed)


@pytest.mark.parametrize(
    ("command", "variable", "value", "said"),
    [
        ("originals", "QAQ_REDIS_URL", "redis://h:port/0", "redis_url: its port is no number"),
        ("worker", "QAQ_HOST", "http://a", "host: 'http://a' is no host name"),
        ("router", "QAQ_ADVERTISE_HOST", "a:7700", "advertise_host: 'a:7700' is no host name"),
        ("gateway", "QAQ_ROUTER", "router", "router: 'router' is no address; give host:port"),
        ("up", "QAQ_REDIS_URL", "redis://h:port/0", "redis_url: its port is no number"),
        ("up", "QAQ_HOST", "a b", "host: 'a b' is no host name"),
        ("generate Hi", "QAQ_ROUTER", "router", "'router' is no address; give host:port"),
        ("generate Hi", "QAQ_REDIS_URL", "redis://h:port/0", "redis_url: its port is no number"),
        ("drain router", "QAQ_HOST", "127.0.0.1", "'router' is no address; give host:port"),
        ("health router:port", "QAQ_HOST", "127.0.0.1", "'router:port' is no address; give host:port"),
        ("worker", "QAQ_METRICS_PORT", "70000", "metrics_port: Input should be less than or equal to 65535"),
        ("originals", "QAQ_TLS_CERT", "/none.pem", "set QAQ_TLS_CA, QAQ_TLS_KEY too"),
        ("originals", "QAQ_SECRET_FILE", "/none", "secret_file: Path does not point to a file"),
    ],
)
def test_commands_end_with_a_sentence(
    command: str, variable: str, value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path))
    model = ["--model", "m"] if command in ("up", "worker", "router") else []
    result = CliRunner().invoke(app, [*command.split(), *model], env={variable: value})
    assert said in " ".join(result.output.split())
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
