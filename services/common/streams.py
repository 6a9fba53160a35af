"""The messages of one generation, from as many routers as it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
import structlog
from qaq.v1 import generate_pb2, generate_pb2_grpc

from services.common.errors import Unavailable
from services.common.routers import Routers

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
        self._session, self._received = "", 0

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()

    async def __aiter__(self) -> AsyncGenerator[generate_pb2.GenerateReply, None]:
        """Raises:
        grpc.aio.AioRpcError: it failed.
        Unavailable: no router is there, or none has gone on with it.
        """
        ends, lost = time.monotonic() + self._deadline_s, None
        while True:
            try:
                async with self._routers.stub() as stub:
                    self._call = self._ask(stub, ends - time.monotonic())
                    async for reply in self._call:
                        self._session, lost = reply.session_id, None
                        self._received += reply.HasField("token")
                        yield reply
                    return
            except (grpc.aio.AioRpcError, Unavailable) as error:
                if not self._goes_on(error):
                    raise
                if lost is None:
                    lost = time.monotonic()
                    log.warning("the router went away; looking for another", session=self._session)
                if time.monotonic() > min(lost + PATIENCE_S, ends):
                    raise self._given_up() from error
            await asyncio.sleep(LOOK_AGAIN_S)

    def _ask(self, stub: generate_pb2_grpc.InferenceStub, deadline_s: float) -> Any:
        options: dict[str, Any] = {"timeout": max(0.0, deadline_s), "metadata": self._metadata}
        if self._session:
            rest = generate_pb2.RejoinRequest(session_id=self._session, received=self._received)
            return stub.Rejoin(rest, **options)
        if isinstance(self._request, generate_pb2.ChatRequest):
            return stub.Chat(self._request, **options)
        return stub.Generate(self._request, **options)

    def _goes_on(self, error: grpc.aio.AioRpcError | Unavailable) -> bool:
        """Whether it had begun and its router is gone. A router's own refusal says when to try again."""
        if not self._session or self._request.choices > 1:
            return False
        if isinstance(error, Unavailable):
            return True
        told = dict(error.trailing_metadata() or ())
        return error.code() is grpc.StatusCode.UNAVAILABLE and "retry-after-ms" not in told

    def _given_up(self) -> Unavailable:
        return Unavailable(
            f"the router went away after {self._received} tokens, and no other has gone on with session "
            f"{self._session}; start one, and rejoin it or send something else"
        )
