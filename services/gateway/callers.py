"""Which certificates may use the gateway, where callers must show one."""

from __future__ import annotations

import asyncio
from typing import Any

from services.common.errors import PermissionDenied
from services.common.roles import may_call, role_of
from services.gateway.connections import Connection
from services.gateway.errors import response

CALLED = "qaq.v1.Inference"


class ClientsOnly(Connection):
    """Answers 403 to certificates of roles that may not call the router."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        certificate = transport.get_extra_info("ssl_object").getpeercert() or {}
        names = [name for kind, name in certificate.get("subjectAltName", ()) if kind == "URI"]
        if not may_call(role_of(names), CALLED):
            self.app = _refused


async def _refused(scope: Any, receive: Any, send: Any) -> None:
    error = PermissionDenied("this certificate's role may not use the gateway; use one of the role client")
    await response(error)(scope, receive, send)
