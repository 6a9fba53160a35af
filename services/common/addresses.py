"""Addresses and URLs as settings and options give them: what is wrong with one is said before it is used."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from qaq_core.base.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?")
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


def check_host(host: str) -> str:
    """A host name or an IP address, alone.

    Raises:
        ConfigError: it is something else, such as a URL or host:port.
    """
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        if not _NAME.fullmatch(host):
            raise ConfigError(f"{host!r} is no host name or IP address; give it without a scheme and a port") from None
    return host


def check_address(address: str) -> str:
    """host:port; an IPv6 address is in brackets.

    Raises:
        ConfigError: it is something else.
    """
    host, _, port = address.rpartition(":")
    bare_ipv6 = ":" in host and not host.startswith("[")
    if not host or bare_ipv6 or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is no address; give host:port, such as 127.0.0.1:7700 or [::1]:7700")
    check_host(host)
    return address


def check_addresses(addresses: str) -> list[str]:
    """Several, separated by commas; an empty text is refused.

    Raises:
        ConfigError: one is no address.
    """
    return [check_address(address.strip()) for address in addresses.split(",")]


def check_redis_url(url: str) -> str:
    """A URL of Redis. Messages do not repeat it, because it may have a password in it.

    Raises:
        ConfigError: Redis' client could not use it.
    """
    from redis.asyncio import ConnectionPool

    if not url.startswith(("redis://", "rediss://")):
        raise ConfigError("it must begin with redis:// or rediss://, as in redis://127.0.0.1:6379/0")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigError(
            "its port is no number up to 65535, or its password has one of / ? # [ ] in it, which must be "
            "percent-encoded"
        ) from None
    if parts.path.strip("/") and not parts.path.strip("/").isdigit():
        raise ConfigError("behind the host comes the number of a database, as in redis://127.0.0.1:6379/0")
    options = parse_qs(parts.query)
    for path in (path for name in _FILES for path in options.get(name, ())):
        if not Path(path).is_file():
            raise ConfigError(f"its file {path} is not there")
    try:
        ConnectionPool.from_url(url).make_connection()  # which connects to nothing yet
    except (TypeError, ValueError):
        raise ConfigError(f"Redis' client does not know one of its options: {', '.join(options)}") from None
    return url
