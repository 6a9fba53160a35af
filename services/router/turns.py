"""One turn of a session: a generation on a worker, forwarded message by message."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import grpc
from qaq.v1 import generate_pb2, worker_pb2
from redis.exceptions import RedisError

from services.common import metrics
from services.common.errors import StatusError
from services.router.latency import RelayLatency
from services.router.relay import Relay
from services.router.sessions import Session, SessionDirectory
from services.router.token_log import LogWriter
from services.router.workers import WorkerPool


class Turn:
    """A generation from its placement to its last message.

    Args:
        request: what the worker is asked; its token_ids are the log with the new prompt at the end, and with what
            was generated already.
        patience_s, latency: see `Relay`.
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
        self._session = session
        self._relay = Relay(sessions, pool, session, request, patience_s, latency)
        self._log = LogWriter(sessions, session.id, request.held, request.token_ids[request.held :], self.end)
        self._clocks = [TokenClock(request.generated) for _ in range(max(1, request.choices))]
        self._ended = False

    def end(self) -> None:
        """Stops the generation because its session was closed."""
        self._ended = True
        self._relay.cancel()

    async def replies(self, deadline_s: float) -> AsyncGenerator[generate_pb2.GenerateReply, None]:
        """The worker's messages, made the client's.

        Raises:
            StatusError: no worker took the generation, or one failed it, or the session was closed meanwhile.
        """
        messages = self._relay.messages(deadline_s)
        try:
            async with contextlib.aclosing(messages):
                async for message in messages:
                    yield await self._forward(message)
        except asyncio.CancelledError:
            if self._ended:
                raise StatusError(
                    f'session "{self._session.id}" was closed while it generated', code=grpc.StatusCode.ABORTED
                ) from None
            raise
        finally:
            # What a cancelled turn generated stays in the log: the worker's cache may hold it too.
            if self._log.began and not self._ended:
                with contextlib.suppress(RedisError):
                    await self._log.flush()

    async def _forward(self, message: worker_pb2.RunReply) -> generate_pb2.GenerateReply:
        reply = generate_pb2.GenerateReply(session_id=self._session.id)
        match message.WhichOneof("event"):
            case "token":
                token = message.token
                if token.choice == 0:
                    self._log.add(token.token_id)
                reply.token.token_id = token.token_id
                reply.token.text = token.text
                reply.token.choice = token.choice
                reply.token.index = self._clocks[token.choice].tick()
                reply.token.chosen_at = token.chosen_at
                if token.HasField("info"):
                    reply.token.info.CopyFrom(token.info)
            case "done":
                # The session's next turn may start as soon as the client has this: the log must be whole.
                await self._log.flush()
                _finished(message.done, reply.finished)
            case "prompt":
                reply.prompt.CopyFrom(message.prompt)
            case _:
                reply.prefill.tokens_done = message.progress.tokens_done
                reply.prefill.tokens_total = message.progress.tokens_total
        return reply


class TokenClock:
    """Counts tokens, from those that came before, and observes when they came."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._last = time.monotonic()

    def tick(self) -> int:
        """The index of the token that came now."""
        now = time.monotonic()
        metric = metrics.inter_token_seconds if self._count else metrics.time_to_first_token_seconds
        metric.observe(now - self._last)
        self._last, self._count = now, self._count + 1
        return self._count - 1


def _finished(done: worker_pb2.RunReply.Done, finished: generate_pb2.Finished) -> None:
    """A choice's last message as the client gets it."""
    finished.reason, finished.text, finished.choice = done.reason, done.text, done.choice
    finished.usage.CopyFrom(done.usage)
    match done.WhichOneof("found"):
        case "stop_string":
            finished.stop_string = done.stop_string
        case "stop_token_id":
            finished.stop_token_id = done.stop_token_id
