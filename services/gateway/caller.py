"""Who an HTTP request is from. The router decides; the gateway passes on what the request says."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

from services.common import tracing
from services.common.bounds import one
from services.common.errors import InvalidArgument
from services.common.limits import MAX_TENANT

TENANT = "x-qaq-tenant"
MAX_AUTHORIZATION = 512

Metadata = tuple[tuple[str, str], ...]


def caller(request: Request) -> Metadata:
    """The headers `authorization` and `x-qaq-tenant` as gRPC metadata, with the request's id and its trace.

    An authorization that no router would accept is left out, which is as if there were no key.

    Raises:
        InvalidArgument: the tenant is too long, or has characters other than printable ASCII; or a header was sent with
            different values.
    """
    name, authorization = (one(header, request.headers.getlist(header)) for header in (TENANT, "authorization"))
    if len(name) > MAX_TENANT or not _printable(name):
        raise InvalidArgument(f"{TENANT} is invalid; send at most {MAX_TENANT} printable ASCII characters")
    named = ((("qaq-tenant", name),) if name else ()) + tracing.outgoing()
    if authorization and len(authorization) <= MAX_AUTHORIZATION and _printable(authorization):
        return (("authorization", authorization), *named)
    return named


def label(scope: Scope) -> str:
    """Tells those apart who share what the gateway has: by their keys, which a router knows, else by their hosts."""
    host, _ = scope.get("client") or ("", 0)
    return Headers(scope=scope).get("authorization") or str(host)


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()
