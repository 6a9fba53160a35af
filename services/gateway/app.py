"""OpenAI's HTTP API, translated to the gRPC API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc

from services.common.errors import InvalidArgument
from services.common.routers import Routers
from services.common.streams import Asked, Stream
from services.gateway import errors, requests, tools
from services.gateway.answers import load_parser
from services.gateway.calls import ClientGone, events, merged, while_connected
from services.gateway.replies import Answer, Chat, Completion, Json, Replies
from services.gateway.schema import ChatRequest, CompletionRequest
from services.gateway.schema import Request as Body

SHORT_DEADLINE_S = 30.0
TENANT_HEADER = "x-qaq-tenant"
MAX_TENANT = 128
CLIENT_CLOSED_REQUEST = 499  # for the access log: the client does not read it


def make_app(routers: Routers, timeout_s: float) -> FastAPI:
    """The FastAPI application.

    Args:
        timeout_s: longest time for a generation.
    """
    app = FastAPI(title="QAQ", description="OpenAI's API for QAQ", redoc_url=None)
    errors.install(app)

    @app.get("/health")
    async def health() -> Json:
        async with routers.stub() as stub:
            await _model(stub)
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> Json:
        async with routers.stub() as stub:
            return {"object": "list", "data": [_described(await _model(stub))]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        async with routers.stub() as stub:
            return _described(await _model(stub, name))

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        echo = [prompt if isinstance(prompt, str) else None for prompt in body.prompts] if body.echo else None
        return await respond(body, request, requests.completions(body), Completion(), echo)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        asked = requests.chat(body)
        return await respond(body, request, [asked], Chat(), prepare=lambda model: tools.prepare(body, asked, model))

    async def respond(
        body: Body,
        request: Request,
        asked: Sequence[Asked],
        shape: Completion | Chat,
        echo: Sequence[str | None] | None = None,
        prepare: Callable[[common_pb2.ModelInfo], tools.Readers | None] = lambda model: None,
    ) -> Response:
        """Asks the router, and responds with one object or with a stream of chunks.

        Args:
            prepare: completes the requests for the model that is served, and says how its answers are read.
        """

        @contextlib.asynccontextmanager
        async def running() -> AsyncIterator[tuple[Answer, Replies]]:
            async with routers.stub() as stub:
                model = await _model(stub, body.model)
            readers = prepare(model)
            if readers is not None:
                await asyncio.to_thread(load_parser)
            answer = Answer(shape, model.name, asked[0].choices, echo, readers)
            streams = [Stream(routers, each, timeout_s, metadata) for each in asked]
            async with contextlib.aclosing(merged(streams)) as replies:
                yield answer, replies

        async def whole() -> Json:
            async with running() as (answer, replies):
                return await answer.collect(replies, len(asked))

        async def parts() -> AsyncGenerator[Json, None]:
            async with running() as (answer, replies):
                async for chunk in answer.chunks(replies, len(asked), body.usage_wanted):
                    yield chunk

        metadata = _tenant(request)
        try:
            if body.stream:
                return await while_connected(request, events(parts()))
            return JSONResponse(await while_connected(request, whole()))
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    return app


def _tenant(request: Request) -> tuple[tuple[str, str], ...]:
    """The header `x-qaq-tenant` as gRPC metadata.

    Raises:
        InvalidArgument: it is too long, or has characters other than printable ASCII.
    """
    name = request.headers.get(TENANT_HEADER, "")
    if not name:
        return ()
    if len(name) > MAX_TENANT or not (name.isascii() and name.isprintable()):
        raise InvalidArgument(f"{TENANT_HEADER} is invalid; send at most {MAX_TENANT} printable ASCII characters")
    return (("qaq-tenant", name),)


async def _model(stub: generate_pb2_grpc.InferenceStub, name: str = "") -> common_pb2.ModelInfo:
    """Raises:
    grpc.aio.AioRpcError: NOT_FOUND if another model is served.
    """
    reply = await stub.GetModel(generate_pb2.GetModelRequest(model=name), timeout=SHORT_DEADLINE_S)
    return reply.model


def _described(model: common_pb2.ModelInfo) -> Json:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "qaq",
        "context_length": model.context_length,
    }
