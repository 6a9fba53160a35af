"""Who an HTTP request is from. The router decides; the gateway passes on what the request says."""

from __future__ import annotations

from fastapi import Request

from services.common.errors import InvalidArgument
from services.common.limits import MAX_TENANT

TENANT = "x-qaq-tenant"
MAX_AUTHORIZATION = 512

Metadata = tuple[tuple[str, str], ...]


def caller(request: Request) -> Metadata:
    """The headers `authorization` and `x-qaq-tenant` as gRPC metadata.

    An authorization that no router would accept is left out, which is as if there were no key.

    Raises:
        InvalidArgument: the tenant is too long, or has characters other than printable ASCII.
    """
    name, authorization = request.headers.get(TENANT, ""), request.headers.get("authorization", "")
    if len(name) > MAX_TENANT or not _printable(name):
        raise InvalidArgument(f"{TENANT} is invalid; send at most {MAX_TENANT} printable ASCII characters")
    named = (("qaq-tenant", name),) if name else ()
    if authorization and len(authorization) <= MAX_AUTHORIZATION and _printable(authorization):
        return (("authorization", authorization), *named)
    return named


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()
