"""The messages of one generation, from as many routers as it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import structlog
from qaq.v1 import generate_pb2, generate_pb2_grpc

from services.gateway.routers import Routers

PATIENCE_S = 30.0
"""How long to look for another router: one that was killed leaves the registry, and lets go of sessions, later."""
LOOK_AGAIN_S = 0.25

Asked = generate_pb2.GenerateRequest | generate_pb2.ChatRequest

log = structlog.get_logger()


class Stream:
    """One generation. When its router dies after its first message, the rest comes from another one.

    Args:
        deadline_s: longest that it may take.
        metadata: of every call.
    """

    def __init__(
        self, routers: Routers, request: Asked, deadline_s: float, metadata: Sequence[tuple[str, str]]
    ) -> None:
        self._routers, self._request = routers, request
        self._deadline_s, self._metadata = deadline_s, tuple(metadata)
        self._call: Any = None

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[generate_pb2.GenerateReply]:
        """Raises:
        grpc.aio.AioRpcError: it failed, or no other router goes on.
        Unavailable: no router is registered.
        """
        session, received, heard = "", 0, time.monotonic()
        ends = heard + self._deadline_s
        while True:
            try:
                async with self._routers.stub() as stub:
                    self._call = self._ask(stub, session, received, ends - time.monotonic())
                    async for reply in self._call:
                        session, heard = reply.session_id, time.monotonic()
                        received += reply.HasField("token")
                        yield reply
                    return
            except grpc.aio.AioRpcError as error:
                if not (session and self._request.choices <= 1 and _lost(error)):
                    raise
                if time.monotonic() - heard > PATIENCE_S:
                    raise
                log.warning("a router went away; looking for another", session=session, received=received)
            await asyncio.sleep(LOOK_AGAIN_S)

    def _ask(self, stub: generate_pb2_grpc.InferenceStub, session: str, received: int, deadline_s: float) -> Any:
        options: dict[str, Any] = {"timeout": max(0.0, deadline_s), "metadata": self._metadata}
        if session:
            return stub.Rejoin(generate_pb2.RejoinRequest(session_id=session, received=received), **options)
        if isinstance(self._request, generate_pb2.ChatRequest):
            return stub.Chat(self._request, **options)
        return stub.Generate(self._request, **options)


def _lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether the connection broke. What a router says itself comes with a time to try again after."""
    told = dict(error.trailing_metadata() or ())
    return error.code() is grpc.StatusCode.UNAVAILABLE and "retry-after-ms" not in told
