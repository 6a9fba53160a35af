"""gRPC channels between QAQ processes."""

from __future__ import annotations

import grpc

_OPTIONS = [
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port for the running loop. It connects at the first call, and reconnects by itself."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
