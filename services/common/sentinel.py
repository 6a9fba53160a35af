"""Redis behind Sentinel: `redis+sentinel://user:password@host:26379,host:26379/service/0`, rediss+sentinel:// with TLS.

The sentinels name the primary whenever a connection is made, so clients follow it after a failover.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis import Redis as BlockingRedis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry as BlockingRetry
from redis.sentinel import Sentinel as BlockingSentinel

from qaq_core.base.errors import ConfigError
from services.common.addresses import check_address, is_local

SCHEMES = ("redis+sentinel", "rediss+sentinel")
PORT = 26379
OF_SENTINELS = {"sentinel_username": "username", "sentinel_password": "password"}
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


@dataclass(frozen=True)
class SentinelUrl:
    """Where sentinels are, and which service of theirs is meant.

    Attributes:
        login: user name and password of the servers. sentinels_login: the same of the sentinels.
        files: of TLS, if the URL names them.
    """

    sentinels: tuple[tuple[str, int], ...]
    service: str
    database: int
    secure: bool
    login: Mapping[str, str]
    sentinels_login: Mapping[str, str]
    files: Mapping[str, str]

    @classmethod
    def parse(cls, url: str) -> SentinelUrl | None:
        """None for a URL of one server.

        Raises:
            ConfigError: it is a sentinel's and something is wrong with it. The message does not repeat it.
        """
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            return None
        credentials, _, hosts = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        service, _, database = parts.path.strip("/").partition("/")
        options = dict(parse_qsl(parts.query))
        if not service or not (database or "0").isdecimal():
            raise ConfigError(
                "behind the sentinels come the name of their service and the number of a database, as in "
                "redis+sentinel://10.0.0.1:26379,10.0.0.2:26379/mymaster/0; one of / ? # in a password must be "
                "percent-encoded"
            )
        unknown = sorted(options.keys() - {*OF_SENTINELS, *TLS_FILES})
        if unknown:
            raise ConfigError(f"a URL of sentinels has no option {', '.join(unknown)}")
        login = {"username": unquote(user), "password": unquote(password)}
        return cls(
            tuple(_address(host) for host in hosts.split(",")),
            unquote(service),
            int(database or 0),
            parts.scheme == "rediss+sentinel",
            {name: value for name, value in login.items() if value},
            {OF_SENTINELS[name]: value for name, value in options.items() if name in OF_SENTINELS},
            {name: value for name, value in options.items() if name in TLS_FILES},
        )

    @property
    def local(self) -> bool:
        """Whether all sentinels are on this machine. Without TLS their primary must be, too."""
        return all(is_local(host) for host, _ in self.sentinels)

    def client(self, tls_files: Mapping[str, Any], timeouts: Mapping[str, float], **options: Any) -> Redis:
        """A client of the primary.

        Args:
            tls_files: of an identity, as arguments of a Redis client.
            timeouts: `socket_…`, of servers and sentinels.
            options: further ones of the pool of connections.
        """
        secured = {**tls_files, **self.files} if self.secure else {}
        ssl = {"ssl": True} if self.secure else {}
        ask = {**timeouts, **secured, **ssl, **self.sentinels_login, "retry": Retry(NoBackoff(), 0)}
        sentinel = Sentinel(self.sentinels, sentinel_kwargs=ask)
        kind = _RenewedConnection if self.secure else SentinelManagedConnection
        servers = {**timeouts, **secured, **self.login, "db": self.database, "connection_class": kind}
        return Redis.from_pool(_Pool(self, sentinel, **servers, **options))

    def ping(self, timeouts: Mapping[str, float]) -> None:
        """Asks the primary for an answer. Raises a RedisError."""
        secured = {**self.files, "ssl": True} if self.secure else {}
        common = {**timeouts, **secured, "retry": BlockingRetry(NoBackoff(), 0)}
        sentinel = BlockingSentinel(self.sentinels, sentinel_kwargs={**common, **self.sentinels_login})
        client: BlockingRedis = sentinel.master_for(self.service, db=self.database, **common, **self.login)
        try:
            client.ping()
        finally:
            client.close()
            for each in sentinel.sentinels:
                each.close()


class _Pool(SentinelConnectionPool, BlockingConnectionPool):
    """A bounded pool of connections to the primary. Whoever finds none waits for one."""

    def __init__(self, url: SentinelUrl, sentinel: Sentinel, **options: Any) -> None:
        super().__init__(url.service, sentinel, **options)
        self._url = url

    async def get_master_address(self) -> Any:
        host, port = await super().get_master_address()
        if self._url.local and not self._url.secure and not is_local(host):
            raise RedisConnectionError(
                f"the sentinels name {host}:{port}, another machine; talk to it by rediss+sentinel:// with TLS"
            )
        return host, port

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:  # the client is closed
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.aclose()


class _RenewedConnection(SentinelManagedSSLConnection):
    """Reads its files whenever it connects."""

    def _connection_arguments(self) -> Any:
        self.ssl_context.context = None
        return super()._connection_arguments()


def _address(text: str) -> tuple[str, int]:
    whole = text if ":" in text.rpartition("]")[2] else f"{text}:{PORT}"
    try:
        host, _, port = check_address(whole).rpartition(":")
    except ConfigError:  # whose message repeats it, and it may be a part of a password
        raise ConfigError(
            "one of its sentinels is no host:port, or its password has one of / ? # [ ] @ in it, which must be "
            "percent-encoded"
        ) from None
    return host.strip("[]"), int(port)
