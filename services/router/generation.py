"""The stream of one generation, with failover.

When the worker of a generation goes away, the generation is resumed on another worker, which gets the tokens
generated so far and the ids of the stored pages. The client's stream continues with the next token.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import grpc
import structlog
from qaq.v1 import common_pb2, generate_pb2, worker_pb2
from redis.exceptions import RedisError

from services.common import metrics, tracing
from services.common.echoes import EchoOnce
from services.common.errors import StatusError, Unavailable
from services.router.hold import Hold, Lost
from services.router.metrics import RelayLatency, TokenTimes
from services.router.model import RETRY_AFTER_MS, Model
from services.router.quotas import Meter
from services.router.session import Session
from services.router.session_pages import SessionPages
from services.router.token_log import LogWriter
from services.router.workers import WorkerLink

PLACEMENT_RETRY_S = 0.25
HINT_TIMEOUT_S = 1.0
FRUITLESS = 3
"""Workers in a row that may go away without a new token. After that the generation itself is taken for the cause."""

_LOST: dict[Lost, str] = {
    "closed": "was closed while it generated",
    "taken": "is generating for another call, which has taken it",
    "gone": "was lost when Redis lost its data; open another one",
}

log = structlog.get_logger()

# The status of a worker that goes away, and of a worker that has no room.
_GONE, _FULL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


class GenerationStream:
    """A generation from its placement on a worker to its last message.

    Args:
        hold: on the session; also an attribute. page_ids: of the session's stored pages.
        request: for the first worker. Its token_ids are the session's log, then the new prompt, then the tokens that
            were generated before. Each new token is appended, for the worker that may have to resume.
        meter: counts the tokens for the tenant's quota.
        patience_s: seconds to wait for a worker to resume on.
        latency: gets the time that each token spends in this router.
    """

    def __init__(
        self,
        model: Model,
        session: Session,
        hold: Hold,
        page_ids: Sequence[bytes],
        request: worker_pb2.RunRequest,
        meter: Meter,
        patience_s: float,
        latency: RelayLatency,
    ) -> None:
        self._model, self._session, self.hold = model, session, hold
        self._request, self._meter, self._patience_s = request, meter, patience_s
        self._latency, self._times = latency, TokenTimes(request.choices)
        self._echo = EchoOnce()
        history = request.history_tokens
        self._log = LogWriter(hold, history, request.token_ids[history:], lambda: self.abort(hold.lost))
        hold.known = self._known
        self._pages = SessionPages(hold, page_ids)
        self._request.page_ids[:] = page_ids
        self._cached_on = session.worker
        self._call: Any = None
        self._started = False
        self._aborted: Lost | None = None
        self._refused: dict[str, grpc.aio.AioRpcError] = {}
        self._fruitless = 0
        self._lost_at: float | None = None

    def reprice(self, floor: float) -> None:
        """The least price of a bit has changed; a worker that resumes it is told."""
        self._request.lambda_floor = floor

    def abort(self, reason: Lost | None) -> None:
        """Ends the generation because its session was lost."""
        self._aborted = reason or "closed"
        if self._call is not None:
            self._call.cancel()

    async def replies(self, deadline_s: float) -> AsyncGenerator[generate_pb2.GenerateReply, None]:
        """The messages for the client, each token once.

        Raises:
            StatusError: no worker accepts or resumes the generation, a worker fails it, or its session was closed.
        """
        ends = time.monotonic() + deadline_s
        try:
            while True:
                link, received = await self._place(), False
                self._echo.restart()
                try:
                    async with self._run(link, ends - time.monotonic()) as messages:
                        async for message in messages:
                            arrived = time.perf_counter()
                            received = self._started = True
                            reply = self._reply(message)
                            if reply is None:
                                continue
                            if reply.HasField("finished"):
                                await self._complete_log(ends)
                            yield reply
                            # The next reply is requested when gRPC has taken this one.
                            if reply.HasField("token"):
                                self._latency.observe(time.perf_counter() - arrived)
                    return
                except grpc.aio.AioRpcError as error:
                    self._fail_over(link, error, received)
        except asyncio.CancelledError:
            if not self._aborted:
                raise
            message = f'session "{self._session.id}" {_LOST[self._aborted]}'
            raise StatusError(message, code=grpc.StatusCode.ABORTED) from None
        finally:
            await self._flush()

    async def _place(self) -> WorkerLink:
        """A worker to start or resume the generation.

        Raises:
            StatusError: there is none. A generation that has started waits for one for `patience_s`.
        """
        while True:
            link = self._model.place(self._session, self._request.token_ids, self._refused)
            if link is not None:
                return link
            lost = time.monotonic() - self._lost_at if self._lost_at else 0.0
            if not self._started or self._model.removed or lost >= self._patience_s:
                raise self._unplaced()
            await asyncio.sleep(PLACEMENT_RETRY_S)
            self._refused.clear()  # a worker may be back, or have room again

    @contextlib.asynccontextmanager
    async def _run(self, link: WorkerLink, deadline_s: float) -> AsyncIterator[Any]:
        """The call to a worker, whose messages are to be read."""
        link.calls += 1
        unwanted, self._call = False, None
        try:
            with tracing.span("run", "client", **{"server.address": link.address}):
                await self._remember(link)
                if self._aborted:
                    raise asyncio.CancelledError
                self._call = link.stub.Run(self._request, timeout=max(0.0, deadline_s), metadata=tracing.outgoing())
                try:
                    yield self._call
                except (asyncio.CancelledError, GeneratorExit, grpc.aio.AioRpcError) as end:
                    unwanted = self._unwanted(end)
                    raise
        finally:
            link.calls -= 1
            if self._call is not None:
                self._call.cancel()  # no effect on a call that has ended
            if unwanted:
                link.cancel(self._request)

    async def _remember(self, link: WorkerLink) -> None:
        """Writes down which worker has the cache, before it has one: who closes the session drops it there.

        It is a hint for the next turn and for who rejoins this one, too: it neither waits for Redis long nor fails.
        """
        if link.address != self._cached_on:
            with contextlib.suppress(RedisError, TimeoutError):
                await asyncio.wait_for(self.hold.set_worker(link.address), HINT_TIMEOUT_S)
                self._cached_on = link.address

    def _unwanted(self, end: BaseException) -> bool:
        """Whether nobody will ask a worker for the rest of the generation, after its call ended so: the client has gone
        away, or its deadline has passed. One whose session was taken, or whose router stops, is with another router."""
        if isinstance(end, grpc.aio.AioRpcError):
            return end.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return not (self._aborted == "taken" or self._model.leaving)

    def _reply(self, message: worker_pb2.RunReply) -> generate_pb2.GenerateReply | None:
        """A worker's message as the client gets it; None if it is not for the client."""
        event = message.WhichOneof("event")
        match event:
            case "pages":
                self._pages.put(message.pages)
                return None
            case "prefill" | "prompt" if self._request.generated_tokens:
                return None  # the client has them from the worker before
            case "prompt":
                tokens = self._echo.fresh(message.prompt)
                return generate_pb2.GenerateReply(session_id=self._session.id, prompt=tokens) if tokens else None
            case "token":
                self._record(message.token)
        return generate_pb2.GenerateReply(session_id=self._session.id, **{event: getattr(message, event)})

    def _record(self, token: common_pb2.Token) -> None:
        """Keeps a token for the session's log and for resuming."""
        self._lost_at, self._fruitless = None, 0
        self._times.observe(token)
        self._meter.tokens += 1
        if token.choice == 0:
            self._log.add(token.token_id)
        if self._request.choices <= 1:
            self._request.token_ids.append(token.token_id)
            self._request.generated_tokens += 1

    def _fail_over(self, link: WorkerLink, error: grpc.aio.AioRpcError, received: bool) -> None:
        """Prepares the request for another worker.

        Args:
            received: the failed worker had sent messages.
        Raises:
            StatusError: the generation cannot be continued elsewhere.
        """
        resumable = error.code() is _GONE and self._request.choices <= 1 and self._fruitless < FRUITLESS
        if error.code() not in (_GONE, _FULL) or (received and not resumable):
            raise _status(error, received) from error
        log.warning("a worker went away" if received else "a worker refused", worker=link.address)
        self._refused[link.address] = error
        self._lost_at = self._lost_at or time.monotonic()
        if received:
            self._fruitless += 1
            self._request.page_ids[:] = self._pages.ids
            metrics.resumed.inc()

    def _unplaced(self) -> StatusError:
        """The error for a generation that no worker takes."""
        full = [error for error in self._refused.values() if error.code() is _FULL]
        if full:
            return _status(full[0], received=False)
        if not self._started or self._model.removed:
            return self._model.no_worker()
        message = "the worker went away while it generated, and no other worker could resume; send the request again"
        return StatusError(message, code=_GONE, retry_after_ms=RETRY_AFTER_MS)

    def _known(self) -> Sequence[int]:
        """The session's log. Its turn is in it once a token has come."""
        tokens = self._request.token_ids
        return tokens if self._log.began else tokens[: self._request.history_tokens]

    async def _complete_log(self, ends: float) -> None:
        """Writes the rest of the log. A kept session's next turn reads it, and may begin once the client has the end.

        Raises:
            Unavailable: Redis refuses it, or does not answer, for `patience_s` or until the deadline.
        """
        if not self._session.kept:
            return
        try:
            await self._log.flush(min(self._patience_s, ends - time.monotonic()))
        except RedisError as error:
            message = (
                f"every token was sent, but Redis does not take the last ones into the log of session "
                f'"{self._session.id}": its next turn would lack them; rejoin it once Redis works'
            )
            raise Unavailable(message, retry_after_ms=RETRY_AFTER_MS) from error

    async def _flush(self) -> None:
        """Writes what the session's next turn needs."""
        with contextlib.suppress(RedisError):  # the next turn computes what it cannot load
            await self._pages.flush()
        # The tokens of a cancelled generation stay in the log: the worker's cache may have them too.
        if self._log.began and not self._aborted:
            with contextlib.suppress(RedisError):
                await self._log.flush()


def _status(error: grpc.aio.AioRpcError, received: bool) -> StatusError:
    """A worker's error as the client gets it."""
    if error.code() is _GONE and received:
        message = "the worker went away while it generated; send the request again (a session keeps what arrived)"
        return StatusError(message, code=_GONE, retry_after_ms=RETRY_AFTER_MS)
    retry = RETRY_AFTER_MS if error.code() in (_GONE, _FULL) else None
    return StatusError(error.details() or "the worker failed", code=error.code(), retry_after_ms=retry)
