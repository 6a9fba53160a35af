"""The messages of one generation, with failover to another router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
import structlog
from qaq.v1 import generate_pb2, generate_pb2_grpc

from services.common.echoes import EchoOnce
from services.common.errors import Metadata, Unavailable, limits_of
from services.common.routers import Routers

PATIENCE_S = 30.0
"""How long to look for another router. A killed router leaves the registry, and releases its sessions, only later."""
RETRY_S = 0.25

Asked = generate_pb2.GenerateRequest | generate_pb2.ChatRequest

log = structlog.get_logger()


class Stream:
    """One generation. When its router dies after the first message, another router sends the rest.

    Args:
        deadline_s: longest time for the generation.
        metadata: of every call.

    Attributes:
        limits: what was left of the caller's quotas, once the first message has come; empty without quotas.
    """

    def __init__(
        self, routers: Routers, request: Asked, deadline_s: float, metadata: Sequence[tuple[str, str]]
    ) -> None:
        self._routers, self._request = routers, request
        self._deadline_s, self._metadata = deadline_s, tuple(metadata)
        self._call: Any = None
        self._session, self._received = "", 0
        self.limits: Metadata = ()
        self._echo = EchoOnce()

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()

    async def __aiter__(self) -> AsyncGenerator[generate_pb2.GenerateReply, None]:
        """Raises:
        grpc.aio.AioRpcError: the generation failed.
        Unavailable: no router answers, or none has continued the generation.
        """
        ends, lost = time.monotonic() + self._deadline_s, None
        while True:
            try:
                async with self._routers.stub() as stub:
                    self._call = self._ask(stub, ends - time.monotonic())
                    self._echo.restart()
                    async for reply in self._call:
                        if not self._session:
                            self.limits = limits_of(await self._call.initial_metadata())
                        self._session, lost = reply.session_id, None
                        self._received += reply.HasField("token")
                        if reply.HasField("prompt"):
                            tokens = self._echo.fresh(reply.prompt)
                            if tokens is None:
                                continue
                            reply.prompt.CopyFrom(tokens)
                        yield reply
                    return
            except (grpc.aio.AioRpcError, Unavailable) as error:
                if not self._resumable(error):
                    raise
                if lost is None:
                    lost = time.monotonic()
                    log.warning("the router went away; looking for another", session=self._session)
                if time.monotonic() > min(lost + PATIENCE_S, ends):
                    raise self._given_up() from error
            await asyncio.sleep(RETRY_S)

    def _ask(self, stub: generate_pb2_grpc.InferenceStub, deadline_s: float) -> Any:
        options: dict[str, Any] = {"timeout": max(0.0, deadline_s), "metadata": self._metadata}
        if self._session:
            rest = generate_pb2.RejoinRequest(session_id=self._session, received=self._received)
            return stub.Rejoin(rest, **options)
        if isinstance(self._request, generate_pb2.ChatRequest):
            return stub.Chat(self._request, **options)
        return stub.Generate(self._request, **options)

    def _resumable(self, error: grpc.aio.AioRpcError | Unavailable) -> bool:
        """Whether the generation had begun and its router is gone. An error of the router itself has retry-after-ms."""
        if not self._session or self._request.choices > 1:
            return False
        if isinstance(error, Unavailable):
            return True
        metadata = dict(error.trailing_metadata() or ())
        return error.code() is grpc.StatusCode.UNAVAILABLE and "retry-after-ms" not in metadata

    def _given_up(self) -> Unavailable:
        return Unavailable(
            f"the router went away after {self._received} tokens, and no other has continued session "
            f"{self._session}; start a router, then rejoin the session or send the request again"
        )
