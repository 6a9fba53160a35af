"""The served models, and the gateway itself: health, version, metrics."""

from __future__ import annotations

from importlib.metadata import version

import grpc
from fastapi import APIRouter, Request
from fastapi.responses import Response
from google.protobuf.json_format import MessageToDict
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from qaq.v1 import common_pb2, generate_pb2

from services.common.errors import InvalidArgument, Metadata, Unavailable, to_status
from services.common.limits import MAX_CHOICES
from services.common.metrics import GATEWAY
from services.common.routers import Routers
from services.gateway.caller import caller
from services.gateway.replies import Json
from services.gateway.requests import default_sampling

SHORT_DEADLINE_S = 30.0


async def ask(request: Request) -> None:
    """Asks a router whether a request's caller may ask: before its body is read, and its model is known then. While no
    router answers, nobody is refused for that yet.

    Raises:
        grpc.aio.AioRpcError: UNAUTHENTICATED without a key, RESOURCE_EXHAUSTED if its tenant has used up its requests.
    """
    try:
        async with request.app.state.routers.stub() as stub:
            asked = generate_pb2.GetModelRequest(call_follows=True)
            request.state.model = await stub.GetModel(asked, timeout=SHORT_DEADLINE_S, metadata=caller(request))
    except (grpc.aio.AioRpcError, Unavailable) as error:
        status = to_status(error)
        # What the body names may be served all the same.
        if status is None or status.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND):
            raise


async def served(
    routers: Routers,
    metadata: Metadata,
    name: str = "",
    choices: int = 1,
    request: Request | None = None,
    session: str = "",
) -> common_pb2.ModelInfo:
    """The model of a name; without one that of a session, else the default.

    Args:
        choices: of one prompt, that will be asked for.
        request: for which a router may have said the default already.
        session: that will be continued, or empty.
    Raises:
        grpc.aio.AioRpcError: NOT_FOUND if it is not served, UNAUTHENTICATED without a key.
        InvalidArgument: too many choices.
    """
    reply = None if request is None else getattr(request.state, "model", None)
    if name:
        session = ""  # a router checks that they are of one model, when it looks at the session
    if session or reply is None or name not in ("", reply.model.name, reply.model.source):
        async with routers.stub() as stub:
            asked = generate_pb2.GetModelRequest(model=name, session_id=session)
            reply = await stub.GetModel(asked, timeout=SHORT_DEADLINE_S, metadata=metadata)
    if choices > (most := reply.max_choices or MAX_CHOICES):
        raise InvalidArgument(f"n is {choices}; send 1 to {most}")
    return reply.model


async def usable(routers: Routers, metadata: Metadata) -> list[common_pb2.ModelInfo]:
    """The models that can be used, the default first.

    Raises:
        grpc.aio.AioRpcError: UNAVAILABLE before the first worker, UNAUTHENTICATED without a key.
    """
    async with routers.stub() as stub:
        reply = await stub.ListModels(generate_pb2.ListModelsRequest(), timeout=SHORT_DEADLINE_S, metadata=metadata)
    return [each.model for each in reply.models if not each.unavailable]


def routes(routers: Routers) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health(request: Request) -> Json:
        """Whether a router answers; if that needs no key, or with one, also whether it has had a worker."""
        try:
            await usable(routers, caller(request))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise
        return {"status": "ok"}

    @router.get("/version")
    async def release() -> Json:
        return {"version": version("qaq-kv")}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(GATEWAY), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models")
    async def models(request: Request) -> Json:
        return {"object": "list", "data": [_described(each) for each in await usable(routers, caller(request))]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Json:
        return _described(await served(routers, caller(request), name))

    return router


def _described(model: common_pb2.ModelInfo) -> Json:
    defaults = MessageToDict(default_sampling(model), preserving_proto_field_name=True)
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "qaq",
        "root": model.source,
        "max_model_len": model.context_length,
        "context_length": model.context_length,
        "default_sampling_params": defaults,
    }
