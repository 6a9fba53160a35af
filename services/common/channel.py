"""gRPC channels between QAQ processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from services.common import tls
from services.common.identity import Identity
from services.common.roles import Role, server_name

PING_S = 3.0
"""How often the peer of a call is asked for a sign of life, and how long it may take: a process that hangs, unlike one
that died, keeps its connections."""
LEAVE_S = 3600.0
"""How long calls may go on that began before the certificates changed."""

Dial = Callable[[str], grpc.aio.Channel]
"""Opens a channel to host:port, as `open_channel` does."""

_MS = int(1000 * PING_S)
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", _MS),
    ("grpc.keepalive_timeout_ms", _MS),
    # gRPC waits as long as this for the answer to any ping, by default for a minute, whatever the keepalive says.
    ("grpc.http2.ping_timeout_ms", _MS),
    # Token ids of the largest text, and their strings.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


def open_channel(address: str, identity: Identity | None = None, role: Role | None = None) -> grpc.aio.Channel:
    """A channel to host:port for the running loop. It connects at the first call, and reconnects by itself.

    Args:
        identity: who calls; None is without TLS.
        role: of the server, which its certificate must name. None takes any role.
    """
    if identity is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    return RenewedChannel(address, identity, role)


def open_blocking_channel(address: str, identity: Identity | None = None, role: Role | None = None) -> grpc.Channel:
    """The same for callers without an event loop."""
    if identity is None:
        return grpc.insecure_channel(address, options=_OPTIONS)
    return grpc.secure_channel(address, tls.channel_credentials(identity.pems), options=_tls_options(role))


class RenewedChannel(grpc.aio.Channel):
    """A channel with TLS whose calls use the certificates as they are when the call begins.

    gRPC keeps the certificates of a channel for as long as it lives, so this one has another inside after a change.
    Calls that run stay where they are.
    """

    def __init__(self, address: str, identity: Identity, role: Role | None) -> None:
        self._address, self._identity, self._role = address, identity, role
        self._leaving: dict[asyncio.Task[None], grpc.aio.Channel] = {}
        self._pems = identity.pems
        self._inner = self._open()

    async def __aenter__(self) -> RenewedChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        left = dict(self._leaving)
        await asyncio.gather(self._inner.close(grace), asyncio.wait(left, timeout=grace or 0.0) if left else _nothing())
        for task, channel in left.items():
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
                await channel.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        return self._callable("unary_unary", method, options)

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return self._callable("unary_stream", method, options)

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return self._callable("stream_unary", method, options)

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return self._callable("stream_stream", method, options)

    def _open(self) -> grpc.aio.Channel:
        credentials = tls.channel_credentials(self._pems)
        return grpc.aio.secure_channel(self._address, credentials, options=_tls_options(self._role))

    def _current(self) -> grpc.aio.Channel:
        """The channel inside, replaced if the certificates changed."""
        pems = self._identity.pems
        if pems is not self._pems:
            self._pems, left = pems, self._inner
            self._inner = self._open()
            task = asyncio.get_running_loop().create_task(left.close(LEAVE_S))
            self._leaving[task] = left
            task.add_done_callback(self._leaving.pop)
        return self._inner

    def _callable(self, kind: str, method: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
        """A method of the channel that is inside when the method is called."""
        made_of: grpc.aio.Channel | None = None
        made: Any = None

        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal made_of, made
            channel = self._current()
            if channel is not made_of:
                made_of, made = channel, getattr(channel, kind)(*method, **options)
            return made(*arguments, **settings)

        return call


async def _nothing() -> None:
    """For a channel without old connections."""


def _tls_options(role: Role | None) -> list[tuple[str, Any]]:
    return [*_OPTIONS, ("grpc.ssl_target_name_override", server_name(role))]
