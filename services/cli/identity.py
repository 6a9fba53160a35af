"""Who a command is when it calls a server."""

from __future__ import annotations

import asyncio
import contextlib

from redis.exceptions import RedisError

from qaq_core.base.errors import ConfigError
from services.cluster import state
from services.cluster.status import addresses
from services.common.identity import Identity
from services.common.settings import CommonSettings


def identity(servers: str | None = None) -> Identity | None:
    """The identity for servers, host:port, several by comma; for those of the running stack if None.

    QAQ_TLS_CA, QAQ_TLS_CERT and QAQ_TLS_KEY come first. Without them, the servers of the stack that runs on this
    machine are called as its operator, and others without TLS (None).

    Raises:
        ConfigError: the files are not complete or cannot be used.
    """
    named = CommonSettings()
    if named.tls_ca is not None:
        if (named.tls_cert is None) != (named.tls_key is None):
            raise ConfigError("QAQ_TLS_CERT and QAQ_TLS_KEY belong together; set both or none")
        return Identity(named.tls_ca, named.tls_cert, named.tls_key)
    running = state.load()
    if running is None or not running.alive:
        return None
    if servers is not None and not _belongs(servers, running):
        return None
    return running.access.identity("operator")


def _belongs(servers: str, running: state.StackState) -> bool:
    asked = {server.strip() for server in servers.split(",")}
    known = {running.router, running.gateway}
    with contextlib.suppress(RedisError):
        known |= asyncio.run(addresses(running.access))
    return bool(asked & known)
