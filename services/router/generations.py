"""The generations that run through this router: each holds a session, waits in its model's queue, and streams."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import grpc
from qaq.v1 import common_pb2, generate_pb2, worker_pb2
from redis.exceptions import RedisError

from services.common import tracing
from services.common.settings import RouterSettings
from services.router import validation
from services.router.generation import GenerationStream
from services.router.hold import Hold, Lost
from services.router.metrics import RelayLatency
from services.router.model import Model
from services.router.quotas import Meter
from services.router.session import Session
from services.router.sessions import SessionDirectory

Request = generate_pb2.GenerateRequest | generate_pb2.ChatRequest
Replies = AsyncGenerator[generate_pb2.GenerateReply, None]
Encode = Callable[[list[int]], Awaitable[list[int]]]
"""Makes a prompt's token ids, given the tokens in the session's log."""


class Generations:
    """Runs generations. Keeps no state but those that run.

    Attributes:
        latency: times that recent tokens spent in this router.
    """

    def __init__(self, settings: RouterSettings, sessions: SessionDirectory) -> None:
        self._settings, self._sessions = settings, sessions
        self.latency = RelayLatency()
        self._streams: dict[str, GenerationStream] = {}  # by session

    @contextlib.asynccontextmanager
    async def turn(
        self,
        request: Request,
        session: Session,
        model: Model,
        encode: Encode,
        meter: Meter,
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[Replies]:
        """The replies of a session's next turn. The session cannot have another turn meanwhile."""
        async with self._held(session) as hold:
            history = await self._sessions.tokens(session.id, model.info.vocab_size)
            prompt = await encode(history)
            validation.fits(len(history), len(prompt), request.stop, model.info.context_length)
            meter.tokens += len(prompt)
            run = worker_pb2.RunRequest(
                session_id=session.id,
                token_ids=prompt,
                sampling=_seeded(request.sampling),
                stop=request.stop,
                cache=session.cache,
                keep=session.kept,
                choices=request.choices,
                output=request.output,
                constraint=request.constraint,
                history_tokens=len(history),
                branch_of=session.branch_of,
                tenant=session.tenant,
            )
            await hold.write_turn(run)
            run.token_ids[:0] = history
            async with self._stream(session, model, hold, run, meter, context) as replies:
                yield replies

    @contextlib.asynccontextmanager
    async def last_turn(
        self, received: int, session: Session, model: Model, meter: Meter, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Replies]:
        """The replies of a session's last turn, from the first token that its log does not have.

        Tokens that are generated again are the same as before, because the request has a seed. The session is taken
        from the router that has it: whether that one is dead, hangs, or is only cut off, its client is here.

        Args:
            received: tokens that the client has.
        """
        async with self._held(session, take=True) as hold:
            self.abort(session.id, "taken")
            run = validation.rejoin(received, await self._sessions.turn(session.id))
            log = await self._sessions.tokens(session.id, model.info.vocab_size)
            begins = run.history_tokens + len(run.token_ids)
            known = log[begins : begins + received]  # fewer, if the router was killed before it wrote all
            if len(log) > begins + received:
                await hold.cut(begins + received)
            run.token_ids[:] = [*log[: run.history_tokens], *run.token_ids, *known]
            run.generated_tokens, run.tenant = len(known), session.tenant
            async with self._stream(session, model, hold, run, meter, context) as replies:
                yield replies

    def reprice(self, session_id: str, floor: float) -> None:
        """Tells a generation that runs here the least price of a bit in its session's cache."""
        if stream := self._streams.get(session_id):
            stream.reprice(floor)

    def abort(self, session_id: str, reason: Lost) -> None:
        """Ends the generation of a session that was lost, if it runs here."""
        if stream := self._streams.get(session_id):
            stream.abort(reason)

    @contextlib.asynccontextmanager
    async def _stream(
        self,
        session: Session,
        model: Model,
        hold: Hold,
        run: worker_pb2.RunRequest,
        meter: Meter,
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[Replies]:
        """The replies of a generation, once the model's queue admits it."""
        run.fence, run.lambda_floor = hold.fence, session.lambda_floor
        tracing.tell(session=session.id, prompt_tokens=len(run.token_ids), choices=max(1, run.choices))
        resumed = session.kept or run.generated_tokens  # else it is new, and has none
        page_ids = await self._sessions.pages(session.id) if resumed else ()
        patience_s = self._settings.resume_timeout_s
        stream = GenerationStream(model, session, hold, page_ids, run, meter, patience_s, self.latency)
        self._streams[session.id] = stream
        try:
            async with (
                model.admission.place(run.tenant, max(1, run.choices), self._deadline(context)),
                contextlib.aclosing(stream.replies(self._deadline(context))) as replies,
            ):
                yield replies
        finally:
            if self._streams.get(session.id) is stream:  # else a client has rejoined here
                del self._streams[session.id]

    @contextlib.asynccontextmanager
    async def _held(self, session: Session, *, take: bool = False) -> AsyncIterator[Hold]:
        """Holds a session. One that is for this call alone is left for a minute: its client may be cut off, and have
        less than was sent to it. After an error, which ends the call, it is deleted."""

        def lost(reason: Lost) -> None:
            stream = self._streams.get(session.id)
            if stream is not None and stream.hold is hold:  # else a client has rejoined here, with another hold
                stream.abort(reason)

        async with self._sessions.held(session.id, lost, session.tenant, take=take) as hold:
            ending = hold.leave
            try:
                yield hold
            except Exception:
                ending = hold.forget
                raise
            finally:
                if not session.kept:
                    with contextlib.suppress(RedisError):  # it expires by itself
                        await ending()

    def _deadline(self, context: grpc.aio.ServicerContext) -> float:
        """Seconds that a generation may take: the client's deadline, at most `request_timeout_s`."""
        remaining = context.time_remaining()
        limit = self._settings.request_timeout_s
        return limit if remaining is None else min(remaining, limit)


def _seeded(params: common_pb2.SamplingParams) -> common_pb2.SamplingParams:
    """The same parameters with a seed, so that another worker samples the same tokens."""
    seeded = common_pb2.SamplingParams()
    seeded.CopyFrom(params)
    if not seeded.HasField("seed"):
        seeded.seed = secrets.randbits(64)
    return seeded
