"""The public API. A generation reads as the protocol: who calls, which session and model, is it valid, stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import structlog
from qaq.v1 import generate_pb2, generate_pb2_grpc

from services.common.errors import PermissionDenied
from services.router import validation
from services.router.callers import Callers
from services.router.generations import Encode, Generations, Replies, Request
from services.router.model import Model
from services.router.models import Models
from services.router.prompts import Conversation
from services.router.quotas import Meter, TenantQuotas
from services.router.session import Session
from services.router.sessions import SessionDirectory
from services.router.workers import Workers

log = structlog.get_logger()


@dataclass(frozen=True)
class Call:
    """A call that generates.

    Attributes:
        session: that it names; None: one for this call alone.
        meter: counts its tokens.
    """

    tenant: str
    model: Model
    session: Session | None
    meter: Meter


class InferenceService(generate_pb2_grpc.InferenceServicer):
    """Keeps no state; sessions are in Redis, and what runs is in `Generations`."""

    def __init__(
        self,
        callers: Callers,
        quotas: TenantQuotas,
        sessions: SessionDirectory,
        workers: Workers,
        models: Models,
        generations: Generations,
    ) -> None:
        self._callers, self._quotas = callers, quotas
        self._sessions, self._workers = sessions, workers
        self._models, self._generations = models, generations

    async def Generate(self, request: generate_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> Replies:
        async with self._admitted(context, request) as (tenant, meter):
            call = await self._call(request, tenant, meter)
            validation.generate(request, call.model.limits)
            prompts = await call.model.prompts()

            async def encode(history: list[int]) -> list[int]:
                if request.prompt_token_ids:
                    return list(request.prompt_token_ids)
                special_tokens, length = not history, call.model.info.context_length
                return await prompts.text(
                    request.prompt, special_tokens=special_tokens, context=length, tenant=call.tenant
                )

            async with self._turn(request, call, encode, context) as replies:
                async for reply in replies:
                    yield reply

    async def Chat(
        self, request: generate_pb2.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generate_pb2.GenerateReply]:
        async with self._admitted(context, request) as (tenant, meter):
            call = await self._call(request, tenant, meter)
            validation.chat(request, call.model.limits)
            conversation = await asyncio.to_thread(Conversation.of, request)
            prompts, opening = await call.model.prompts(), ""

            async def encode(history: list[int]) -> list[int]:
                nonlocal opening
                if request.opening:
                    opening = await prompts.opening(conversation, call.tenant)
                length = call.model.info.context_length
                return await prompts.chat(conversation, history, context=length, tenant=call.tenant)

            async with self._turn(request, call, encode, context) as replies:
                async for reply in replies:
                    if opening:
                        text, opening = generate_pb2.ChatOpening(text=opening), ""
                        yield generate_pb2.GenerateReply(session_id=reply.session_id, opening=text)
                    yield reply

    async def Rejoin(
        self, request: generate_pb2.RejoinRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generate_pb2.GenerateReply]:
        validation.session_id(request.session_id)
        async with self._admitted(context) as (tenant, meter):
            session = await self._sessions.get(request.session_id, tenant)
            model = self._models.of(session)
            model.admission.check(tenant)
            async with self._generations.last_turn(request.received, session, model, meter, context) as replies:
                async for reply in replies:
                    known = reply.HasField("token") and reply.token.index < request.received
                    if not known and not (reply.HasField("prompt") and request.received):
                        yield reply

    async def Tokenize(
        self, request: generate_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.TokenizeReply:
        caller = self._callers.of(context)
        await self._quotas.request(caller)
        model, tenant = self._models.get(request.model), caller.tenant
        limits = model.limits
        validation.tokenize(request, limits)
        prompts = await model.prompts()
        if request.messages:
            conversation = await asyncio.to_thread(Conversation.of, request)
            answer = not request.no_generation_prompt
            ids = await prompts.chat(conversation, [], answer=answer, context=limits.context, tenant=tenant)
        else:
            special_tokens = not request.no_special_tokens
            ids = await prompts.text(request.text, special_tokens=special_tokens, context=limits.context, tenant=tenant)
        strings = await prompts.written(ids, tenant) if request.token_strings else ()
        return generate_pb2.TokenizeReply(token_ids=ids, tokens=strings)

    async def Detokenize(
        self, request: generate_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.DetokenizeReply:
        caller = self._callers.of(context)
        await self._quotas.request(caller)
        model = self._models.get(request.model)
        validation.detokenize(request, model.limits)
        prompts = await model.prompts()
        return generate_pb2.DetokenizeReply(text=await prompts.decode(list(request.token_ids), caller.tenant))

    async def GetModel(
        self, request: generate_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.GetModelReply:
        caller = self._callers.of(context)
        if request.call_follows:
            await self._quotas.look(caller)
        if request.session_id:
            validation.session_id(request.session_id)
            session = await self._sessions.get(request.session_id, caller.tenant)
            model = self._models.of(session, request.model)
        else:
            model = self._models.get(request.model)
        await model.prompts()  # it can be used
        return self._models.described(model)

    async def ListModels(
        self, request: generate_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.ListModelsReply:
        models = self._models
        return generate_pb2.ListModelsReply(models=[models.described(model) for model in models.list()])

    async def OpenSession(
        self, request: generate_pb2.OpenSessionRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.OpenSessionReply:
        caller = self._callers.of(context)
        await self._quotas.request(caller)
        validation.session(request)
        tenant, limit = caller.tenant, caller.quotas.open_sessions
        if request.branch_of:
            self._models.of(await self._sessions.get(request.branch_of, tenant), request.model)
            session = await self._sessions.branch(request.branch_of, tenant, limit)
        else:
            model = self._models.get(request.model)
            session = await self._sessions.open(model.name, request.cache, kept=True, tenant=tenant, limit=limit)
        return generate_pb2.OpenSessionReply(session_id=session.id)

    async def CloseSession(
        self, request: generate_pb2.CloseSessionRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.CloseSessionReply:
        validation.session_id(request.session_id)
        caller = self._callers.of(context)
        session = await self._sessions.close(request.session_id, None if caller.operator else caller.tenant)
        # A generation of another router ends when that router finds that its lock on the session is gone.
        self._generations.abort(session.id, "closed")
        await self._workers.drop(session)
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
                model=session.model,
            )
        return reply

    @contextlib.asynccontextmanager
    async def _admitted(
        self, context: grpc.aio.ServicerContext, request: Request | None = None
    ) -> AsyncIterator[tuple[str, Meter]]:
        """The tenant of a generation that its quotas admit, and what counts its tokens. Nothing is done for a call
        before that.

        Args:
            request: None if it was admitted before, and is rejoined.
        """
        caller = self._callers.of(context)
        if request is not None and not request.session_id and (model := self._models.find(request.model)):
            model.admission.check(caller.tenant)
        async with self._quotas.stream(caller, rejoined=request is None) as meter:
            if meter.headers:
                await context.send_initial_metadata(meter.headers)
            yield caller.tenant, meter

    async def _call(self, request: Request, tenant: str, meter: Meter) -> Call:
        """What a request asks, and of which model. Nothing else of it is read before that model's queue has room."""
        if not request.session_id:
            return Call(tenant, self._models.get(request.model), None, meter)
        validation.continues(request)
        session = await self._sessions.get(request.session_id, tenant)
        model = self._models.of(session, request.model)
        model.admission.check(tenant)
        return Call(tenant, model, session, meter)

    @contextlib.asynccontextmanager
    async def _turn(
        self, request: Request, call: Call, encode: Encode, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Replies]:
        """The replies of the next turn of the call's session, or of a new one for this call alone."""
        session = call.session or await self._sessions.open(
            call.model.name, request.cache, kept=False, tenant=call.tenant
        )
        async with self._generations.turn(request, session, call.model, encode, call.meter, context) as replies:
            yield replies
