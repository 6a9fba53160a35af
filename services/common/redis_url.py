"""URLs of Redis: what is wrong with one is said before it is used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from qaq_core.base.errors import ConfigError
from services.common.sentinel import TLS_FILES, SentinelUrl


def check_redis_url(url: str) -> str:
    """A URL of Redis. Messages do not repeat it, because it may have a password in it.

    Raises:
        ConfigError: Redis' client could not use it.
    """
    from redis.asyncio import ConnectionPool

    if url.startswith(("redis+cluster://", "rediss+cluster://")):
        raise ConfigError(
            "Redis Cluster cannot be used: one script changes a page, its holders and the sum of all bytes, which a "
            "cluster spreads over servers; name one server, or sentinels as redis+sentinel://host:26379/service/0"
        )
    try:
        sentinels = SentinelUrl.parse(url)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError("a host or port of it is none, or its password is not percent-encoded") from None
    if sentinels is not None:
        _check_files(sentinels.files.values())
        return url
    if not url.startswith(("redis://", "rediss://")):
        raise ConfigError(
            "it must begin with redis:// or rediss://, as in redis://127.0.0.1:6379/0, or with redis+sentinel:// or "
            "rediss+sentinel://"
        )
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
    _check_files(path for name in TLS_FILES for path in options.get(name, ()))
    try:
        ConnectionPool.from_url(url).make_connection()  # which connects to nothing yet
    except (TypeError, ValueError):
        raise ConfigError(f"Redis' client does not know one of its options: {', '.join(options)}") from None
    return url


def hosts_of(url: str) -> list[str]:
    """The hosts that a URL of Redis names: of the server, or of the sentinels."""
    parsed = SentinelUrl.parse(url)
    if parsed is None:
        return [urlsplit(url).hostname or "localhost"]
    return [host for host, _ in parsed.sentinels]


def _check_files(paths: Iterable[str]) -> None:
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"its file {path} is not there")
