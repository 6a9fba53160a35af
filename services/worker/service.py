"""The worker's gRPC service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from qaq.v1 import common_pb2, inspect_pb2, worker_pb2, worker_pb2_grpc

from qaq_core.base.pages import dtype_name
from qaq_core.models import LoadedModel, ModelShape
from services.common import tracing
from services.worker.inspection import Inspector
from services.worker.orphans import Orphans
from services.worker.sampling import model_defaults
from services.worker.scheduler.scheduler import Scheduler


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Passes requests to the scheduler and its replies to the caller."""

    def __init__(
        self,
        scheduler: Scheduler,
        inspector: Inspector,
        model: common_pb2.ModelInfo,
        max_sequences: int,
        orphan_s: float,
        drain: Callable[[], Awaitable[int]],
    ) -> None:
        self._scheduler, self._max_sequences = scheduler, max_sequences
        self._inspector = inspector
        self._orphans = Orphans(scheduler, orphan_s)
        self._model = model
        self._drain = drain

    async def Run(
        self, request: worker_pb2.RunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.RunReply]:
        tracing.tell(session=request.session_id)
        self._scheduler.check(request)
        grammar = await self._scheduler.grammars.get(request.constraint, request.tenant)
        await self._scheduler.methods.ready(request.cache)
        self._orphans.check(request)
        call = self._scheduler.submit(request, grammar).call
        unfinished = max(1, request.choices)
        with self._orphans.kept(request, call):
            while unfinished:
                reply = await call.replies.get()
                if isinstance(reply, Exception):
                    raise reply
                yield reply
                unfinished -= reply.HasField("finished")

    async def Cancel(
        self, request: worker_pb2.CancelRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.CancelReply:
        self._orphans.cancel((request.tenant, request.session_id), request.fence)
        return worker_pb2.CancelReply()

    async def Drop(self, request: worker_pb2.DropRequest, context: grpc.aio.ServicerContext) -> worker_pb2.DropReply:
        existed = await asyncio.wrap_future(self._scheduler.drop(request.session_id, request.tenant))
        return worker_pb2.DropReply(existed=existed)

    async def Drain(self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext) -> worker_pb2.DrainReply:
        return worker_pb2.DrainReply(moved=await self._drain())

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DescribeReply:
        state = self._scheduler.state
        return worker_pb2.DescribeReply(
            model=self._model,
            running=state.running,
            waiting=state.waiting,
            sessions=state.sessions,
            kv_bytes=state.kv_bytes,
            max_sequences=self._max_sequences,
            kv_budget_bytes=self._scheduler.budget or 0,
            lambda_floor=self._scheduler.sessions.memory.lam,
            kv_bytes_fp16=state.fp16_bytes,
            bits=state.bits,
            exceptions=state.exceptions,
            rows_requantized=state.rows_requantized,
        )

    async def Inspect(
        self, request: inspect_pb2.InspectRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.CacheView:
        return await self._inspector.view(request)

    async def SetFloor(
        self, request: inspect_pb2.SetFloorRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.SetFloorReply:
        return inspect_pb2.SetFloorReply(lambda_floor=await self._inspector.set_floor(request))

    async def SetBudget(
        self, request: inspect_pb2.SetBudgetRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.SetBudgetReply:
        self._inspector.set_budget(request.kv_budget_bytes)
        return inspect_pb2.SetBudgetReply()


def model_info(loaded: LoadedModel) -> common_pb2.ModelInfo:
    """The description of the worker's model."""
    shape = ModelShape.of(loaded.model)
    return common_pb2.ModelInfo(
        name=loaded.name,
        fingerprint=loaded.fingerprint,
        context_length=loaded.context_length,
        layers=shape.layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype_name(loaded.dtype),
        vocab_size=loaded.model.get_input_embeddings().weight.shape[0],
        eos_token_ids=loaded.eos_token_ids,
        has_chat_template=bool(loaded.tokenizer.chat_template),
        source=loaded.source,
        sampling=model_defaults(loaded.model.generation_config),
        response_template=_response_template(loaded.tokenizer),
        model_type=loaded.model.config.model_type,
    )


def _response_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "response_template", None)
    return json.dumps(template) if template else ""
