"""A Redis client with bounded connections, timeouts and retries."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import SecretStr
from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoPermissionError, OutOfMemoryError, RedisError

from qaq_core.base.errors import ConfigError, QAQError
from services.common.sentinel import SentinelUrl

if TYPE_CHECKING:  # who a server is takes roles, whose errors have a status, and those of Redis are among them
    from services.common.identity import Identity

CONNECT_TIMEOUT_S = 2.0
CALL_TIMEOUT_S = 5.0
_OOM = "OOM command not allowed"


class RedisUnreachableError(QAQError):
    """Redis does not answer. The message has its address and what to do."""


def connect(
    url: str | SecretStr, identity: Identity | None = None, *, retries: int = 3, max_connections: int = 32
) -> Redis:
    """A client, which connects at its first command.

    A command whose connection broke is sent again up to `retries` times, so it may run twice: pass 0 for commands that
    must not, such as APPEND.

    Args:
        identity: for rediss:// and rediss+sentinel://. The URL may name other files:
            `?ssl_ca_certs=…&ssl_certfile=…&ssl_keyfile=…`.
    """
    text = url.get_secret_value() if isinstance(url, SecretStr) else url
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries)
    sentinels = SentinelUrl.parse(text)
    if sentinels is not None:
        timeouts = {"socket_timeout": CALL_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
        files = tls_files(identity)
        return sentinels.client(files, timeouts, timeout=CALL_TIMEOUT_S, max_connections=max_connections, retry=retry)
    secure = text.startswith("rediss:")
    pool = BlockingConnectionPool.from_url(
        text,
        max_connections=max_connections,
        timeout=CALL_TIMEOUT_S,
        socket_timeout=CALL_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=retry,
        **(tls_files(identity) if secure else {}),
    )
    if secure:
        pool.connection_class = _RenewedConnection
    return Redis.from_pool(pool)


def tls_files(identity: Identity | None) -> dict[str, Any]:
    """The files of an identity as arguments of a Redis client."""
    if identity is None:
        return {}
    return {"ssl_ca_certs": identity.ca, "ssl_certfile": identity.cert, "ssl_keyfile": identity.key}


class _RenewedConnection(SSLConnection):
    """Reads its files whenever it connects."""

    def _connection_arguments(self) -> Any:
        self.ssl_context.context = None
        return super()._connection_arguments()


async def check(client: Redis, url: str | SecretStr) -> None:
    """Raises:
    RedisUnreachableError: the server does not answer.
    ConfigError: it is a part of a Redis Cluster.
    """
    try:
        await client.ping()
        with contextlib.suppress(NoPermissionError):  # of a user that may not ask; a cache service's may
            if (await client.info("cluster")).get("cluster_enabled"):
                raise ConfigError(f"Redis at {redacted(url)} is a Redis Cluster; give QAQ one server, or sentinels")
    except RedisError as error:
        raise RedisUnreachableError(
            f"Redis at {redacted(url)} does not answer ({error}); start it, or correct QAQ_REDIS_URL"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether Redis refused a write because its memory is full. Of a script's write only the text tells."""
    return isinstance(error, OutOfMemoryError) or (isinstance(error, RedisError) and _OOM in str(error))


def redacted(url: str | SecretStr) -> str:
    """The URL without its credentials, for messages."""
    parts = urlsplit(url.get_secret_value() if isinstance(url, SecretStr) else url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
