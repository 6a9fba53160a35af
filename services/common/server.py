"""A grpc.aio server with health checks, reflection, limits, and the conversion of errors to statuses."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from qaq_core.base.errors import QAQError
from services.common import environment, memory, tls
from services.common.identity import Identity
from services.common.interceptor import StatusInterceptor
from services.common.roles import Guard

MAX_REQUEST_BYTES = 5 << 20
# More than the limit, so that most oversized requests get a message instead of a transport error.
_TRANSPORT_BYTES = 16 << 20
# A silent connection is closed, and every one is at times renewed. Running calls end first: without a grace period
# after the age gRPC waits for them.
_IDLE_MS, _AGE_MS, _HANDSHAKE_MS = 300_000, 3_600_000, 10_000
STOP_S = 5.0
"""How long a server that stops waits for cancelled handlers, after its grace period."""

_SERVING = health_pb2.HealthCheckResponse.SERVING


log = structlog.get_logger()


class PortTakenError(QAQError):
    """An address cannot be bound. The message has the address."""


class GrpcServer:
    """A server for one or more services.

    Args:
        host, port: address to bind; port 0 takes any free port.
        advertise_host: host name of this machine for other servers, if it is not `host`.
        max_request_bytes: larger requests get INVALID_ARGUMENT.
        max_concurrent_rpcs: further calls get RESOURCE_EXHAUSTED. One connection has three quarters of them at most;
            its other calls wait at their client.
        identity: serves with TLS, and only what the caller's role may call. None serves in clear, to everybody.
        certificates: callers must show a certificate. Otherwise they are clients, and are asked for none.
        interceptors: see every call before the services do. Their errors become statuses.
        ping_s: how often clients are asked for a sign of life. Calls of one that hangs end after at most twice as long.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        advertise_host: str | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        max_concurrent_rpcs: int = 1024,
        identity: Identity | None = None,
        certificates: bool = True,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        ping_s: float = 30.0,
    ) -> None:
        self._host = host
        self._port = port
        self._advertise_host = advertise_host
        self._identity, self._certificates = identity, certificates
        guard = Guard(certificates=certificates) if identity else None
        self._interceptors = [StatusInterceptor(max_request_bytes, guard), *interceptors]
        self._max_concurrent_rpcs = max_concurrent_rpcs
        self._ping_s = ping_s
        self._services: list[tuple[str, Callable[[Any, grpc.aio.Server], None], Any]] = []
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    def add(self, name: str, add_to_server: Callable[[Any, grpc.aio.Server], None], servicer: Any) -> None:
        """Adds a service; to be called before `start`. Its streaming methods must be async generators.

        Args:
            name: full name of the service.
            add_to_server: the generated `add_…Servicer_to_server`.
        """
        self._services.append((name, add_to_server, servicer))

    async def start(self) -> str:
        """Binds and serves. Returns the address for other servers, "host:port".

        Raises:
            PortTakenError: the address cannot be bound.
        """
        ping_ms, patience_ms = int(1000 * self._ping_s), int(1000 * min(self._ping_s, 10.0))
        server = grpc.aio.server(
            interceptors=self._interceptors,
            maximum_concurrent_rpcs=self._max_concurrent_rpcs,
            options=[
                # Otherwise a second server on the same port would share its connections instead of failing.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", _TRANSPORT_BYTES),
                ("grpc.max_concurrent_streams", max(1, self._max_concurrent_rpcs * 3 // 4)),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
                ("grpc.max_connection_age_ms", _AGE_MS),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                ("grpc.keepalive_time_ms", ping_ms),
                ("grpc.keepalive_timeout_ms", patience_ms),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.ping_timeout_ms", patience_ms),
                # Clients ask more often, see `channel.PING_S`.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
            ],
        )
        for _, add_to_server, servicer in self._services:
            add_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [name for name, _, _ in self._services]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        try:
            port = self._bind(server)
        except RuntimeError as error:
            raise PortTakenError(
                f"cannot listen on {_join(self._host, self._port)}: the port is taken or the address is not of "
                "this machine; choose another port (0 takes any free one) or host"
            ) from error
        await server.start()
        memory.watch()
        self._server = server
        for name in names:
            await self._health.set(name, _SERVING)
        return reachable(self._host, port, self._advertise_host)

    def _bind(self, server: grpc.aio.Server) -> int:
        address = _join(self._host, self._port)
        if self._identity is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, tls.server_credentials(self._identity, certificates=self._certificates))

    async def stop(self, grace: float = 2.0) -> None:
        """Reports NOT_SERVING, gives running calls `grace` seconds to end, then cancels them."""
        server, self._server = self._server, None
        if server is None:
            return
        await self._health.enter_graceful_shutdown()
        # Not cancelled when it takes too long: gRPC would then wait forever for the cancelled task.
        stopping = asyncio.create_task(server.stop(grace), name="stop")
        await asyncio.wait([stopping], timeout=grace + STOP_S)
        if stopping.done():
            stopping.result()
        else:
            log.error("cancelled calls have not ended; they are abandoned")


def reachable(host: str, port: int, advertise_host: str | None) -> str:
    """The address for other servers of a server that is bound to host:port."""
    if not advertise_host and host in ("0.0.0.0", "::"):
        advertise_host = socket.gethostname()
    return _join(advertise_host or host, port)


class Role(Protocol):
    """A router, worker, gateway or cache service."""

    async def start(self) -> str:
        """Returns the address, host:port."""
        ...

    async def stop(self) -> None: ...


async def run_until_signal(role: Role) -> None:
    """Runs a role until SIGTERM or SIGINT. Main thread only."""
    for name, meant in environment.unknown().items():
        log.warning(environment.told(name, meant))
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    address = await role.start()
    log.info("serving", role=type(role).__name__, address=address)
    try:
        await asked.wait()
    finally:
        await role.stop()


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
