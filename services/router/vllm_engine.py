"""vLLM's engine protocol, as SMG speaks it to its workers, over the public API of the same router."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TypeVar

import grpc
from google.protobuf import json_format
from qaq.v1 import common_pb2
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as smg

from services.common.errors import InvalidArgument, StatusError
from services.router import validation, vllm_requests
from services.router.callers import Callers
from services.router.models import Models
from services.router.service import InferenceService
from services.router.tokenizer_files import TokenizerFiles
from services.router.vllm_replies import Answer

SERVICE_NAME = vllm.DESCRIPTOR.services_by_name["VllmEngine"].full_name
PIECE_BYTES = 64 << 10
MAX_REQUEST_ID_BYTES = 256
_SERVER_TYPE = "vllm-grpc"
"""How SMG knows the protocol."""

T = TypeVar("T")


class VllmEngine(vllm_engine_pb2_grpc.VllmEngineServicer):
    """The default model of this router as one engine of one rank. A generation is a call of `Inference`, so it is
    checked, queued, placed and resumed like any other; a second engine is a second router."""

    def __init__(self, inference: InferenceService, callers: Callers, models: Models) -> None:
        self._inference, self._callers, self._models = inference, callers, models
        self._files: TokenizerFiles | None = None
        # By tenant and request id; set when the request is aborted.
        self._running: dict[tuple[str, str], asyncio.Event] = {}
        self._started, self._received_at = time.monotonic(), 0.0

    async def Generate(
        self, request: vllm.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[vllm.GenerateResponse]:
        self._received_at = time.time()
        generation = vllm_requests.generation(request)
        answer = Answer(stream=request.stream, choices=min(max(1, generation.choices), validation.MAX_CHOICES))
        with self._abortable(self._callers.of(context).tenant, request.request_id) as aborted:
            async with contextlib.aclosing(_until(aborted, self._inference.Generate(generation, context))) as replies:
                async for reply in replies:
                    for response in answer.of(reply):
                        yield response
            if aborted.is_set():
                for response in answer.aborted():
                    yield response

    async def Abort(self, request: vllm.AbortRequest, context: grpc.aio.ServicerContext) -> vllm.AbortResponse:
        """Ends the caller's requests; those that have ended, or were never here, are none of its concern."""
        tenant = self._callers.of(context).tenant
        for identifier in request.request_ids:
            if aborted := self._running.get((tenant, identifier)):
                aborted.set()
        return vllm.AbortResponse()

    async def HealthCheck(
        self, request: vllm.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> vllm.HealthCheckResponse:
        default = self._models.default
        ready = len(default.links) if default is not None else 0
        return vllm.HealthCheckResponse(healthy=ready > 0, message=f"ready workers: {ready}")

    async def GetModelInfo(
        self, request: vllm.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> vllm.GetModelInfoResponse:
        served = self._models.get()
        model, tokenizer = served.info, (await served.prompts()).tokenizer
        return vllm.GetModelInfoResponse(
            model_path=model.source,
            is_generation=True,
            max_context_length=model.context_length,
            vocab_size=model.vocab_size,
            served_model_name=model.name,
            tokenizer_path=model.source,
            model_type=model.model_type,
            eos_token_ids=model.eos_token_ids,
            # The protocol has no word for a tokenizer without them.
            pad_token_id=tokenizer.pad_token_id or 0,
            bos_token_id=tokenizer.bos_token_id or 0,
            # One token at least is generated.
            max_req_input_len=model.context_length - 1,
            default_sampling_params_json=_defaults(model.sampling),
        )

    async def GetServerInfo(
        self, request: vllm.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> vllm.GetServerInfoResponse:
        model = self._models.get()
        return vllm.GetServerInfoResponse(
            active_requests=len(self._running),
            last_receive_timestamp=self._received_at,
            uptime_seconds=time.monotonic() - self._started,
            server_type=_SERVER_TYPE,
            data_parallel_size=1,
            model_dtype=model.info.dtype,
            max_num_seqs=model.capacity,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: grpc.aio.ServicerContext) -> vllm.GetLoadsResponse:
        if request.dp_rank:
            raise InvalidArgument(f"dp_rank is {request.dp_rank}, and this engine has one rank; send 0")
        model = self._models.default
        facts = [link.facts for link in model.links if link.facts] if model else []
        running = sum(each.running for each in facts)
        waiting = sum(each.waiting for each in facts) + (model.admission.waiting if model else 0)
        budgets = [each.kv_budget_bytes for each in facts]
        used = sum(each.kv_bytes for each in facts) / sum(budgets) if budgets and all(budgets) else 0.0
        load = vllm.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            token_usage=used,
            utilization=used,
            max_running_requests=model.capacity if model else 0,
        )
        now = datetime.now(UTC).isoformat()
        return vllm.GetLoadsResponse(timestamp=now, version=version("qaq-kv"), dp_rank_count=1, loads=[load])

    async def GetTokenizer(
        self, request: smg.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[smg.GetTokenizerChunk]:
        tokenizer = (await self._models.get().prompts()).tokenizer
        if self._files is None or self._files.tokenizer is not tokenizer:
            self._files = TokenizerFiles(tokenizer)
        archive = await self._files.archive()
        *pieces, last = archive.pieces(PIECE_BYTES)
        for piece in pieces:
            yield smg.GetTokenizerChunk(data=piece)
        yield smg.GetTokenizerChunk(data=last, sha256=archive.sha256)

    async def SubscribeKvEvents(
        self, request: smg.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[smg.KvEventBatch]:
        raise _unserved("this engine sends no events of its cache; ask GetLoads for its load")
        yield  # a stream, as the server expects

    async def Embed(self, request: vllm.EmbedRequest, context: grpc.aio.ServicerContext) -> vllm.EmbedResponse:
        raise _unserved("this engine generates text and has no embeddings")

    async def FlushCache(
        self, request: smg.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> smg.FlushCacheResponse:
        raise _unserved("stored prefixes belong to all routers and expire by themselves; they cannot be flushed")

    async def StartProfile(
        self, request: smg.StartProfileRequest, context: grpc.aio.ServicerContext
    ) -> smg.ProfileResponse:
        raise _unserved("this engine has no profiler")

    async def StopProfile(
        self, request: smg.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> smg.ProfileResponse:
        raise _unserved("this engine has no profiler")

    @contextlib.contextmanager
    def _abortable(self, tenant: str, identifier: str) -> Iterator[asyncio.Event]:
        """An event that `Abort` sets.

        Raises:
            InvalidArgument: the id is empty, too long, or that of a request of the tenant that runs.
        """
        size = len(identifier.encode())
        if not 0 < size <= MAX_REQUEST_ID_BYTES:
            raise InvalidArgument(f"request_id has {size} bytes; send 1 to {MAX_REQUEST_ID_BYTES}")
        if (tenant, identifier) in self._running:
            raise InvalidArgument(f'request_id "{identifier}" is running; send another id, or abort that request')
        aborted = self._running[tenant, identifier] = asyncio.Event()
        try:
            yield aborted
        finally:
            del self._running[tenant, identifier]


async def _until(ended: asyncio.Event, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """What a generator yields before an event. It is closed then, and also when this one is closed."""
    end = asyncio.create_task(ended.wait())
    following: asyncio.Future[T | None] | None = None
    try:
        while not ended.is_set():
            following = asyncio.ensure_future(anext(source, None))
            await asyncio.wait({following, end}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done() or (item := following.result()) is None:
                return
            yield item
    finally:
        end.cancel()
        if following is not None and not following.done():
            following.cancel()
            await asyncio.wait({following})
        await source.aclose()


def _defaults(sampling: common_pb2.SamplingParams) -> str:
    """What unset parameters are, as JSON under the names of the protocol, which are the same."""
    return json_format.MessageToJson(sampling, preserving_proto_field_name=True, indent=None)


def _unserved(message: str) -> StatusError:
    return StatusError(message, code=grpc.StatusCode.UNIMPLEMENTED)
