"""Sessions over HTTP: a text that grows over several calls, and keeps its cache between them.

A call continues a session by its `session_id`.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import model_validator
from qaq.v1 import generate_pb2

from services.common.errors import InvalidArgument
from services.common.routers import Routers
from services.gateway import requests
from services.gateway.caller import caller
from services.gateway.models import SHORT_DEADLINE_S
from services.gateway.objects import Name, Object, SessionId
from services.gateway.replies import Json
from services.gateway.schema import CacheOptions
from services.gateway.wire import JsonRoute


class OpenRequest(Object):
    """A new session: empty with cache options, or as a branch of another one."""

    model: Name = ""
    cache: CacheOptions | None = None
    branch_of: SessionId = ""

    @model_validator(mode="after")
    def _a_branch_has_the_cache_of_its_origin(self) -> OpenRequest:
        if self.branch_of and self.cache is not None:
            raise InvalidArgument("cache is that of the origin in a branch; leave it out")
        return self


EMPTY = OpenRequest()


def routes(routers: Routers) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/sessions")
    async def open_session(request: Request, body: OpenRequest = EMPTY) -> Json:
        asked = generate_pb2.OpenSessionRequest(
            model=body.model, cache=requests.cache(body.cache), branch_of=body.branch_of
        )
        async with routers.stub() as stub:
            reply = await stub.OpenSession(asked, timeout=SHORT_DEADLINE_S, metadata=caller(request))
        return {"id": reply.session_id, "object": "session"}

    @router.get("/v1/sessions")
    async def list_sessions(request: Request, all_tenants: bool = False) -> Json:
        async with routers.stub() as stub:
            asked = generate_pb2.ListSessionsRequest(all_tenants=all_tenants)
            reply = await stub.ListSessions(asked, timeout=SHORT_DEADLINE_S, metadata=caller(request))
        return {"object": "list", "data": [_listed(session) for session in reply.sessions]}

    @router.delete("/v1/sessions/{session_id}")
    async def close_session(session_id: str, request: Request) -> Json:
        async with routers.stub() as stub:
            asked = generate_pb2.CloseSessionRequest(session_id=session_id)
            await stub.CloseSession(asked, timeout=SHORT_DEADLINE_S, metadata=caller(request))
        return {"id": session_id, "object": "session.deleted", "deleted": True}

    return router


def _listed(session: generate_pb2.SessionInfo) -> Json:
    return {
        "id": session.session_id,
        "object": "session",
        "created": int(session.opened_at),
        "tokens": session.tokens,
        "running": session.running,
        "tenant": session.tenant,
        "model": session.model,
    }
