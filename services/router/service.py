"""The public API. A generation reads as the protocol: validate, find the session, encode the prompt, stream."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import grpc
import structlog
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc, worker_pb2
from redis.exceptions import RedisError

from services.common import metrics, tracing
from services.common.admission import Admission
from services.common.errors import PermissionDenied
from services.common.settings import RouterSettings
from services.router import validation
from services.router.callers import Callers
from services.router.generation import GenerationStream
from services.router.hold import Hold, Lost
from services.router.metrics import RelayLatency
from services.router.prompts import Conversation, Prompts
from services.router.quotas import Meter, TenantQuotas
from services.router.session import Session
from services.router.sessions import SessionDirectory
from services.router.workers import WorkerPool

log = structlog.get_logger()

Request = generate_pb2.GenerateRequest | generate_pb2.ChatRequest
Replies = AsyncGenerator[generate_pb2.GenerateReply, None]
Encode = Callable[[list[int]], Awaitable[list[int]]]
"""Makes a prompt's token ids, given the tokens in the session's log."""


class InferenceService(generate_pb2_grpc.InferenceServicer):
    """Keeps no state but the running generations; sessions are in Redis.

    Attributes:
        latency: times that recent tokens spent in this router.
    """

    def __init__(
        self,
        settings: RouterSettings,
        callers: Callers,
        quotas: TenantQuotas,
        sessions: SessionDirectory,
        pool: WorkerPool,
        prompts: Prompts,
    ) -> None:
        self._settings = settings
        self._callers, self._quotas = callers, quotas
        self._sessions = sessions
        self._pool = pool
        self._prompts = prompts
        self.latency = RelayLatency()
        self._streams: dict[str, GenerationStream] = {}  # by session
        self._admission = Admission(
            settings.max_queue, lambda: pool.capacity, depth=metrics.queue_depth, waited=metrics.queue_seconds
        )
        pool.refreshed = self._admission.wake

    @property
    def waiting(self) -> int:
        """Generations in the queue."""
        return self._admission.waiting

    async def Generate(self, request: generate_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> Replies:
        async with self._admitted(context) as (tenant, meter):
            validation.generate(request, self._limits(request.model))

            async def encode(history: list[int]) -> list[int]:
                if request.prompt_token_ids:
                    return list(request.prompt_token_ids)
                special_tokens, length = not history, self._pool.model.context_length
                return await self._prompts.text(
                    request.prompt, special_tokens=special_tokens, context=length, tenant=tenant
                )

            async with self._turn(request, encode, tenant, meter, context) as replies:
                async for reply in replies:
                    yield reply

    async def Chat(
        self, request: generate_pb2.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generate_pb2.GenerateReply]:
        async with self._admitted(context) as (tenant, meter):
            validation.chat(request, self._limits(request.model))
            conversation = await asyncio.to_thread(Conversation.of, request)
            opening = ""

            async def encode(history: list[int]) -> list[int]:
                nonlocal opening
                if request.opening:
                    opening = await self._prompts.opening(conversation, tenant)
                length = self._pool.model.context_length
                return await self._prompts.chat(conversation, history, context=length, tenant=tenant)

            async with self._turn(request, encode, tenant, meter, context) as replies:
                async for reply in replies:
                    if opening:
                        text, opening = generate_pb2.ChatOpening(text=opening), ""
                        yield generate_pb2.GenerateReply(session_id=reply.session_id, opening=text)
                    yield reply

    async def Rejoin(
        self, request: generate_pb2.RejoinRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generate_pb2.GenerateReply]:
        validation.session_id(request.session_id)
        async with self._last_turn(request, context) as replies:
            async for reply in replies:
                known = reply.HasField("token") and reply.token.index < request.received
                if not known and not (reply.HasField("prompt") and request.received):
                    yield reply

    async def Tokenize(
        self, request: generate_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.TokenizeReply:
        caller = self._callers.of(context)
        await self._quotas.request(caller)
        limits, tenant = self._limits(request.model), caller.tenant
        validation.tokenize(request, limits)
        if request.messages:
            conversation = await asyncio.to_thread(Conversation.of, request)
            answer = not request.no_generation_prompt
            ids = await self._prompts.chat(conversation, [], answer=answer, context=limits.context, tenant=tenant)
        else:
            special_tokens = not request.no_special_tokens
            ids = await self._prompts.text(
                request.text, special_tokens=special_tokens, context=limits.context, tenant=tenant
            )
        strings = await self._prompts.written(ids, tenant) if request.token_strings else ()
        return generate_pb2.TokenizeReply(token_ids=ids, tokens=strings)

    async def Detokenize(
        self, request: generate_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.DetokenizeReply:
        caller = self._callers.of(context)
        await self._quotas.request(caller)
        validation.detokenize(request, self._limits(request.model))
        return generate_pb2.DetokenizeReply(text=await self._prompts.decode(list(request.token_ids), caller.tenant))

    async def GetModel(
        self, request: generate_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.GetModelReply:
        if request.call_follows:
            await self._quotas.look(self._callers.of(context))
        model, pool = self._model(request.model), self._pool
        return generate_pb2.GetModelReply(model=model, workers=len(pool.ready), max_choices=pool.max_choices)

    async def OpenSession(
        self, request: generate_pb2.OpenSessionRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.OpenSessionReply:
        caller = self._callers.of(context)
        await self._quotas.request(caller)
        model = self._model(request.model)
        validation.session(request)
        tenant, limit = caller.tenant, caller.quotas.open_sessions
        if request.branch_of:
            session = await self._sessions.branch(request.branch_of, tenant, limit)
        else:
            session = await self._sessions.open(model.name, request.cache, kept=True, tenant=tenant, limit=limit)
        return generate_pb2.OpenSessionReply(session_id=session.id)

    async def CloseSession(
        self, request: generate_pb2.CloseSessionRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.CloseSessionReply:
        validation.session_id(request.session_id)
        caller = self._callers.of(context)
        session = await self._sessions.close(request.session_id, None if caller.operator else caller.tenant)
        # A generation of another router ends when that router finds that its lock on the session is gone.
        self._abort(session.id, "closed")
        await self._pool.drop(session)
        return generate_pb2.CloseSessionReply()

    async def ListSessions(
        self, request: generate_pb2.ListSessionsRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.ListSessionsReply:
        caller, reply = self._callers.of(context), generate_pb2.ListSessionsReply()
        if request.all_tenants and not caller.operator:
            raise PermissionDenied("all_tenants needs the key of an operator; leave it unset for your own sessions")
        await self._quotas.request(caller)
        for listing in await self._sessions.list(None if request.all_tenants else caller.tenant):
            session = listing.session
            reply.sessions.add(
                session_id=session.id,
                tokens=listing.tokens,
                worker=session.worker,
                running=listing.running,
                opened_at=session.opened_at,
                tenant=session.tenant,
            )
        return reply

    def reprice(self, session_id: str, floor: float) -> None:
        """Tells a generation that runs here the least price of a bit in its session's cache."""
        if stream := self._streams.get(session_id):
            stream.reprice(floor)

    @contextlib.asynccontextmanager
    async def _admitted(
        self, context: grpc.aio.ServicerContext, *, rejoined: bool = False
    ) -> AsyncIterator[tuple[str, Meter]]:
        """The tenant of a generation that its quotas admit, and what counts its tokens. Nothing is done for a call
        before that."""
        caller = self._callers.of(context)
        self._admission.check(caller.tenant)
        async with self._quotas.stream(caller, rejoined=rejoined) as meter:
            if meter.headers:
                await context.send_initial_metadata(meter.headers)
            yield caller.tenant, meter

    @contextlib.asynccontextmanager
    async def _turn(
        self, request: Request, encode: Encode, tenant: str, meter: Meter, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Replies]:
        """The replies of a session's next turn. The session cannot have another turn meanwhile."""
        async with self._held(await self._session(request, tenant)) as (session, hold):
            history = await self._sessions.tokens(session.id, self._pool.model.vocab_size)
            prompt = await encode(history)
            validation.fits(len(history), len(prompt), request.stop, self._pool.model.context_length)
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
                tenant=tenant,
            )
            await hold.write_turn(run)
            run.token_ids[:0] = history
            async with self._stream(session, hold, run, meter, context) as replies:
                yield replies

    @contextlib.asynccontextmanager
    async def _last_turn(
        self, request: generate_pb2.RejoinRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Replies]:
        """The replies of a session's last turn, from the first token that its log does not have.

        Tokens that are generated again are the same as before, because the request has a seed. The session is taken
        from the router that has it: whether that one is dead, hangs, or is only cut off, its client is here.
        """
        async with (
            self._admitted(context, rejoined=True) as (tenant, meter),
            self._held(await self._sessions.get(request.session_id, tenant), take=True) as (session, hold),
        ):
            self._abort(session.id, "taken")
            run = validation.rejoin(request, await self._sessions.turn(session.id))
            log = await self._sessions.tokens(session.id, self._pool.model.vocab_size)
            begins = run.history_tokens + len(run.token_ids)
            known = log[begins : begins + request.received]  # fewer, if the router was killed before it wrote all
            if len(log) > begins + request.received:
                await hold.cut(begins + request.received)
            run.token_ids[:] = [*log[: run.history_tokens], *run.token_ids, *known]
            run.generated_tokens, run.tenant = len(known), tenant
            async with self._stream(session, hold, run, meter, context) as replies:
                yield replies

    @contextlib.asynccontextmanager
    async def _stream(
        self,
        session: Session,
        hold: Hold,
        run: worker_pb2.RunRequest,
        meter: Meter,
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[Replies]:
        """The replies of a generation, once the queue admits it."""
        run.fence, run.lambda_floor = hold.fence, session.lambda_floor
        tracing.tell(session=session.id, prompt_tokens=len(run.token_ids), choices=max(1, run.choices))
        resumed = session.kept or run.generated_tokens  # else it is new, and has none
        page_ids = await self._sessions.pages(session.id) if resumed else ()
        patience_s = self._settings.resume_timeout_s
        stream = GenerationStream(self._pool, session, hold, page_ids, run, meter, patience_s, self.latency)
        self._streams[session.id] = stream
        try:
            async with (
                self._admission.place(run.tenant, max(1, run.choices), self._deadline(context)),
                contextlib.aclosing(stream.replies(self._deadline(context))) as replies,
            ):
                yield replies
        finally:
            if self._streams.get(session.id) is stream:  # else a client has rejoined here
                del self._streams[session.id]

    def _abort(self, session_id: str, reason: Lost) -> None:
        """Ends the generation of a session that was lost, if it runs here."""
        if stream := self._streams.get(session_id):
            stream.abort(reason)

    async def _session(self, request: Request, tenant: str) -> Session:
        """The session that a request names, or a new one for this call alone."""
        if request.session_id:
            return await self._sessions.get(request.session_id, tenant)
        return await self._sessions.open(self._pool.model.name, request.cache, kept=False, tenant=tenant)

    @contextlib.asynccontextmanager
    async def _held(self, session: Session, *, take: bool = False) -> AsyncIterator[tuple[Session, Hold]]:
        """Holds a session. One that is for this call alone is left for a minute: its client may be cut off, and have
        less than was sent to it. After an error, which ends the call, it is deleted."""

        def lost(reason: Lost) -> None:
            stream = self._streams.get(session.id)
            if stream is not None and stream.hold is hold:  # else a client has rejoined here, with another hold
                stream.abort(reason)

        async with self._sessions.held(session.id, lost, session.tenant, take=take) as hold:
            ending = hold.leave
            try:
                yield session, hold
            except Exception:
                ending = hold.forget
                raise
            finally:
                if not session.kept:
                    with contextlib.suppress(RedisError):  # it expires by itself
                        await ending()

    def _model(self, name: str) -> common_pb2.ModelInfo:
        model = self._pool.model
        validation.model(name, model)
        return model

    def _limits(self, name: str) -> validation.Limits:
        model = self._model(name)
        sizes = self._settings.max_prompt_bytes, model.context_length, model.vocab_size, self._pool.max_choices
        return validation.Limits(*sizes)

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
