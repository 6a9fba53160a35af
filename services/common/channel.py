"""gRPC channels between QAQ processes."""

from __future__ import annotations

import grpc

PING_S = 4.0
"""How often the peer of a call is asked for a sign of life, and how long it may take: a process that hangs, unlike one
that died, keeps its connections."""

_MS = int(1000 * PING_S)
_OPTIONS = [
    ("grpc.keepalive_time_ms", _MS),
    ("grpc.keepalive_timeout_ms", _MS),
    # gRPC waits as long as this for the answer to any ping, by default for a minute, whatever the keepalive says.
    ("grpc.http2.ping_timeout_ms", _MS),
    # Token ids of the largest text, and their strings.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port for the running loop. It connects at the first call, and reconnects by itself."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
