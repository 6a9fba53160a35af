"""Where the metrics of this machine's servers are, as Prometheus' HTTP service discovery reads it.

Those that others can reach have TLS and certificates, which Prometheus is told about role by role.
"""

from __future__ import annotations

from fastapi import APIRouter

from services.common.registry import Registry
from services.gateway.replies import Json


def routes(registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics/targets")
    async def targets() -> list[Json]:
        """Each server is one target; `instance` is its own address, as in `qaq status`."""
        found = await registry.members("metrics")
        return [
            {"targets": [member.address], "labels": {name: str(member.info.get(name)) for name in ("job", "instance")}}
            for member in found
        ]

    return router
