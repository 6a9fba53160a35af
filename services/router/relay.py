"""The messages of one generation, from as many workers as it takes.

When a worker goes away the generation is resumed on another one, which is given the tokens that were generated and
the names of the stored pages; the stream goes on with the token after the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import structlog
from qaq.v1 import worker_pb2
from redis.exceptions import RedisError

from services.common import metrics
from services.common.errors import StatusError
from services.router.latency import RelayLatency
from services.router.session_pages import SessionPages
from services.router.sessions import Session, SessionDirectory
from services.router.workers import RETRY_AFTER_MS, WorkerLink, WorkerPool, no_worker

LOOK_AGAIN_S = 0.25
FRUITLESS = 3
"""Workers that may go away one after the other without a token: perhaps this generation is what kills them."""

log = structlog.get_logger()

# What a worker answers that goes away, and what one answers that has no room.
_GONE, _FULL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


class Relay:
    """A generation from its placement to its last message.

    Args:
        request: what the first worker is asked; its token_ids are the log with the new prompt at the end.
        patience_s: seconds to wait for a worker to resume on.
        latency: is told how long each token was here.
    """

    def __init__(
        self,
        sessions: SessionDirectory,
        pool: WorkerPool,
        session: Session,
        request: worker_pb2.RunRequest,
        patience_s: float,
        latency: RelayLatency,
    ) -> None:
        self._sessions, self._pool, self._session = sessions, pool, session
        self._request = request
        self._patience_s = patience_s
        self._latency = latency
        self._pages = SessionPages(sessions, session.id)
        self._holder = session.worker
        self._begun = False
        self._fruitless = 0
        self._lost_at: float | None = None
        self._call: Any = None
        self._ended = False

    def cancel(self) -> None:
        """Ends it; `messages` raises CancelledError."""
        self._ended = True
        if self._call is not None:
            self._call.cancel()

    async def messages(self, deadline_s: float) -> AsyncGenerator[worker_pb2.RunReply, None]:
        """What the client is to be told, each token once.

        Raises:
            StatusError: no worker took the generation, or none went on with it, or one failed it.
            asyncio.CancelledError: it was cancelled.
        """
        ends = time.monotonic() + deadline_s
        if self._session.kept:
            self._request.page_ids[:] = await self._pages.load()
        refused: dict[str, grpc.aio.AioRpcError] = {}
        try:
            while True:
                link = await self._place(refused)
                begun = False
                async with contextlib.aclosing(self._run(link, ends - time.monotonic())) as messages:
                    try:
                        async for message in messages:
                            begun = self._begun = True
                            if not self._note(message):
                                yield message
                        return
                    except grpc.aio.AioRpcError as error:
                        if error.code() not in (_GONE, _FULL) or (begun and not self._resumable(error)):
                            raise _told(error, begun) from error
                        log.warning("a worker went away" if begun else "a worker refused", worker=link.address)
                        refused[link.address] = error
                        self._lost_at = self._lost_at or time.monotonic()
                        self._fruitless += begun
                if begun:
                    metrics.resumed.inc()
                    self._request.page_ids[:] = self._pages.names
        finally:
            with contextlib.suppress(RedisError):  # the next turn computes what it cannot load
                await self._pages.flush()

    def _resumable(self, error: grpc.aio.AioRpcError) -> bool:
        return error.code() is _GONE and self._request.choices <= 1 and self._fruitless < FRUITLESS

    def _note(self, message: worker_pb2.RunReply) -> bool:
        """Takes in what is needed to go on elsewhere; True if the message is not for the client."""
        match message.WhichOneof("event"):
            case "token":
                self._lost_at, self._fruitless = None, 0
                if self._request.choices <= 1:
                    self._request.token_ids.append(message.token.token_id)
                    self._request.generated += 1
            case "pages":
                self._pages.put(message.pages.first, message.pages.ids)
                return True
            case "progress" | "prompt":
                return self._request.generated > 0  # told once already
        return False

    async def _place(self, refused: dict[str, grpc.aio.AioRpcError]) -> WorkerLink:
        """A worker for the generation, or for the rest of it.

        Raises:
            StatusError: there is none; one that has begun waits for it a while.
        """
        while True:
            link = self._pool.place(self._session, self._request.token_ids, refused)
            if link is not None:
                return link
            lost = time.monotonic() - self._lost_at if self._lost_at else 0.0
            if not self._begun or lost >= self._patience_s:
                full = [error for error in refused.values() if error.code() is _FULL]
                raise _told(full[0], begun=False) if full else self._nobody()
            await asyncio.sleep(LOOK_AGAIN_S)
            refused.clear()  # one of them may be back, or have room again

    def _nobody(self) -> StatusError:
        if not self._begun:
            return no_worker()
        message = "the worker went away while it generated, and no other is there to go on; send the request again"
        return StatusError(message, code=_GONE, retry_after_ms=RETRY_AFTER_MS)

    async def _run(self, link: WorkerLink, deadline_s: float) -> AsyncGenerator[worker_pb2.RunReply, None]:
        if self._ended:
            raise asyncio.CancelledError
        if self._session.kept and link.address != self._holder:
            await self._sessions.set_worker(self._session.id, link.address)
            self._holder = link.address
        link.calls += 1
        self._call = call = link.stub.Run(self._request, timeout=max(0.0, deadline_s))
        try:
            async for message in call:
                arrived = time.perf_counter()
                yield message
                # The next message is asked for when gRPC has taken this one.
                if message.HasField("token"):
                    self._latency.took(time.perf_counter() - arrived)
        finally:
            call.cancel()  # the client went away; does nothing to a call that has ended
            link.calls -= 1


def _told(error: grpc.aio.AioRpcError, begun: bool) -> StatusError:
    """A worker's error as the client hears it."""
    if error.code() is _GONE and begun:
        message = "the worker went away while it generated; send the request again (a session keeps what arrived)"
        return StatusError(message, code=_GONE, retry_after_ms=RETRY_AFTER_MS)
    retry = RETRY_AFTER_MS if error.code() in (_GONE, _FULL) else None
    return StatusError(error.details() or "the worker failed", code=error.code(), retry_after_ms=retry)
