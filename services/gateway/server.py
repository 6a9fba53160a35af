"""The gateway as a server, in a process or an actor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import structlog
import uvicorn

from services.common import log, memory, metrics, tls, tracing
from services.common.channel import open_channel
from services.common.identity import Identity, require_loopback
from services.common.redis import check, connect
from services.common.registry import Registry
from services.common.routers import Routers, named, registered
from services.common.server import PortTakenError, reachable, run_until_signal
from services.common.server_identity import identity
from services.common.settings import GatewaySettings
from services.gateway.app import make_app
from services.gateway.callers import ClientsOnly
from services.gateway.connections import Connection

GRACE_S = 2
STOP_S = 5.0
_POLL_S = 0.01

_log = structlog.get_logger()


class GatewayServer:
    """The gateway. `start` and `stop` may each be called once."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> str:
        """Serves, and registers the gateway. Returns its address, host:port.

        Raises:
            ConfigError: a certificate is missing or cannot be used.
            PortTakenError: the port is taken.
            RedisUnreachableError: Redis does not answer.
        """
        settings = self._settings
        tracing.configure("gateway")
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(tracing.flush)
            who = identity(settings)
            measured = stack.enter_context(metrics.serving(settings, who, metrics.GATEWAY))
            redis = connect(settings.redis_url, who)
            stack.push_async_callback(redis.aclose)
            await check(redis, settings.redis_url)
            registry = Registry(redis)
            find = named(settings.router) if settings.router else registered(redis)
            routers = Routers(find, partial(open_channel, identity=who, role="router"))
            stack.push_async_callback(routers.close)
            bound = _bind(settings.host, settings.port)
            stack.callback(bound.close)
            server = _Server(
                uvicorn.Config(
                    make_app(routers, settings, registry),
                    ws="none",
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    timeout_graceful_shutdown=GRACE_S,
                    **_http(settings, who),
                )
            )
            task = asyncio.create_task(server.serve(sockets=[bound]), name="http")

            async def end() -> None:
                server.should_exit = True
                _, late = await asyncio.wait([task], timeout=GRACE_S + STOP_S)
                for left in late:
                    left.cancel()
                    _log.error("requests have not ended; they are abandoned")

            stack.push_async_callback(end)
            while not server.started and not task.done():  # noqa: ASYNC110 (uvicorn sets no event)
                await asyncio.sleep(_POLL_S)
            memory.watch()
            address = reachable(settings.host, bound.getsockname()[1], settings.advertise_host)
            await stack.enter_async_context(registry.announce("gateway", address, {"pid": os.getpid()}))
            await stack.enter_async_context(registry.announce_metrics(measured, "gateway", address))
            self._stack = stack.pop_all()
        return address

    async def stop(self) -> None:
        """Leaves the registry, gives running requests a moment to end, and closes everything."""
        await self._stack.aclose()


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to its caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http(settings: GatewaySettings, who: Identity | None) -> dict[str, Any]:
    """The arguments of uvicorn for its connections, which are HTTPS if there is a certificate.

    Raises:
        ConfigError: HTTP is to be served in clear, and not on loopback.
    """
    if who is None:
        return {"http": Connection}
    if not settings.https:
        require_loopback(settings.host, f"the gateway binds {settings.host} without HTTPS", settings)
        return {"http": Connection}
    context = tls.server_context(who, certificates=settings.client_certificates)
    connection = ClientsOnly if settings.client_certificates else Connection
    return {"ssl_context_factory": lambda *_: context, "http": connection}


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise PortTakenError(
            f"cannot listen on {host}:{port}: the port is taken or the address is not of this machine; choose "
            "another port (0 takes any free one) or host"
        ) from error
    return bound


async def serve(settings: GatewaySettings) -> None:
    """Runs a gateway until SIGTERM or SIGINT."""
    log.configure(settings.log_level)
    await run_until_signal(GatewayServer(settings))
