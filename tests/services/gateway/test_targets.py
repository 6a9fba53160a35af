"""The gateway tells Prometheus where the metrics of this machine's servers are."""

from __future__ import annotations

import contextlib

import httpx2
from redis.asyncio import Redis

from services.common.embedded_redis import EmbeddedRedis
from services.common.registry import Registry
from services.common.settings import GatewaySettings, OriginalsSettings
from services.gateway.server import GatewayServer
from services.originals.server import OriginalsServer


async def test_prometheus_is_told_where_metrics_are(redis: Redis, redis_server: EmbeddedRedis) -> None:
    common = {"redis_url": redis_server.url, "port": 0, "metrics_port": 0, "metrics_https": False}
    gateway, originals = GatewayServer(GatewaySettings(**common)), OriginalsServer(OriginalsSettings(**common))
    async with contextlib.AsyncExitStack() as stack:
        addresses = {}
        for job, server in (("originals", originals), ("gateway", gateway)):
            addresses[await server.start()] = job
            stack.push_async_callback(server.stop)
        (base,) = (address for address, job in addresses.items() if job == "gateway")
        async with httpx2.AsyncClient(base_url=f"http://{base}", timeout=30) as client:
            targets = (await client.get("/metrics/targets")).json()
            texts = {
                target["labels"]["job"]: (await client.get(f"http://{target['targets'][0]}/metrics")).text
                for target in targets
            }
    assert {target["labels"]["instance"]: target["labels"]["job"] for target in targets} == addresses
    assert "qaq_page_bytes" in texts["originals"]
    assert "qaq_http_requests_total" in texts["gateway"]
    assert "qaq_page_bytes" not in texts["gateway"]
    assert await Registry(redis).members("metrics") == []
