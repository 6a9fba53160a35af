"""OpenAI's HTTP API, translated to the gRPC API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

import grpc
from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.telemetry import TelemetryConfig

from services.common.registry import Registry
from services.common.routers import Routers
from services.common.settings import GatewaySettings
from services.common.streams import Asked, Stream
from services.gateway import constraints, errors, inspection, models, page, requests, sessions, targets, texts, tools
from services.gateway.answers import load_parser
from services.gateway.bodies import Bodies
from services.gateway.caller import caller
from services.gateway.calls import ClientGone, Tagged, events, merged, while_connected
from services.gateway.replies import Answer, Json
from services.gateway.schema import ChatRequest, CompletionRequest
from services.gateway.schema import Request as Body
from services.gateway.shapes import Chat, Completion
from services.gateway.wire import CLIENT_CLOSED_REQUEST, EXPOSED_HEADERS, Identified, JsonRoute, Wire


def make_app(routers: Routers, settings: GatewaySettings, registry: Registry | None = None) -> FastAPI:
    """The FastAPI application.

    Args:
        registry: of all servers, for Prometheus.
    """
    # FastAPI's own spans and metrics would be beside ours.
    telemetry: TelemetryConfig = {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}
    app = FastAPI(title="QAQ", description="OpenAI's API for QAQ", docs_url=None, redoc_url=None, telemetry=telemetry)
    app.state.routers = routers
    errors.install(app)
    app.add_middleware(Wire, bodies=Bodies(settings.max_bodies_bytes, settings.max_body_bytes))
    if settings.cors_origins:
        origins = [origin.strip() for origin in settings.cors_origins.split(",")]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(Identified)  # the outermost
    for part in (models, texts, sessions, inspection):
        app.include_router(part.routes(routers))
    app.include_router(page.routes())
    if registry is not None:
        app.include_router(targets.routes(registry))
    app.include_router(_generations(routers, settings.request_timeout_s))
    return app


def _generations(routers: Routers, timeout_s: float) -> APIRouter:
    """Completions and chat completions.

    Args:
        timeout_s: longest time for a generation.
    """
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model = await models.served(routers, caller(request), body.model, body.n, request, body.session_id)
        echo = [prompt if isinstance(prompt, str) else None for prompt in body.prompts] if body.echo else None
        answer = Answer(Completion(body.logprobs, body.echo, body.prompt_logprobs), model, body.n, echo)
        return await respond(body, request, requests.completions(body, model), answer)

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = await models.served(routers, caller(request), body.model, body.n, request, body.session_id)
        asked = requests.chat(body, model)
        readers = tools.prepare(body, asked, model)
        if readers is not None:
            await asyncio.to_thread(load_parser)
        return await respond(body, request, [asked], Answer(Chat(body.prompt_logprobs), model, body.n, readers=readers))

    async def respond(body: Body, request: Request, asked: Sequence[Asked], answer: Answer) -> Response:
        """Asks the router, and responds with one object or with a stream of chunks."""

        def running() -> contextlib.aclosing[AsyncGenerator[Tagged, None]]:
            return contextlib.aclosing(merged(streams))

        async def whole() -> Json:
            async with running() as replies:
                return await answer.collect(replies, len(asked))

        async def parts() -> AsyncGenerator[Json, None]:
            async with running() as replies:
                async for chunk in answer.chunks(replies, len(asked), body.usage_wanted, body.usage_in_chunks):
                    yield chunk

        metadata = caller(request)
        streams = [Stream(routers, each, timeout_s, metadata) for each in asked]
        try:
            response: Response
            if body.stream:
                response = await while_connected(request, events(parts()))
            else:
                response = JSONResponse(await while_connected(request, whole()))
            response.headers.update(next((dict(each.limits) for each in reversed(streams) if each.limits), {}))
            return response
        except grpc.aio.AioRpcError as error:
            raise constraints.retold(requests.retold(error, body), body) from None
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    return router
