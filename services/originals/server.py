"""The cache service, as a process or inside a Ray actor."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack

from qaq.v1 import originals_pb2_grpc

from services.common import log, metrics, tracing
from services.common.channel import PING_S
from services.common.redis import check, connect
from services.common.registry import Registry
from services.common.secret import check_secret
from services.common.server import GrpcServer, run_until_signal
from services.common.server_identity import identity
from services.common.settings import OriginalsSettings
from services.common.tasks import ended
from services.originals.budget import Budget, Keeper
from services.originals.index import PageIndex
from services.originals.service import OriginalsService
from services.originals.store import PageStore

MAX_CONCURRENT_RPCS = 256


class OriginalsServer:
    """Serves originals from Redis. It is registered while it runs."""

    def __init__(self, settings: OriginalsSettings) -> None:
        self._settings = settings
        self._running = AsyncExitStack()

    async def start(self) -> str:
        """Starts the service and returns its address, host:port.

        Raises:
            RedisUnreachableError, SecretMissingError, ConfigError, PortTakenError: the message says what to do; nothing
                is left running.
        """
        settings = self._settings
        tracing.configure("originals")
        async with AsyncExitStack() as stack:
            stack.push_async_callback(tracing.flush)
            check_secret(settings)
            who = identity(settings)
            measured = stack.enter_context(metrics.serving(settings, who))
            redis = connect(settings.redis_url, who)
            stack.push_async_callback(redis.aclose)
            await check(redis, settings.redis_url)
            budget = Budget(settings.page_budget_bytes)
            keeper = Keeper(redis, PageIndex(redis, settings.page_ttl_s), budget)
            await keeper.step()
            stack.push_async_callback(ended, asyncio.create_task(keeper.run(), name="page budget"))
            secret = settings.secret.get_secret_value()
            service = OriginalsService(
                PageStore(redis, settings.page_ttl_s, secret, budget, settings.page_form),
                secret,
                settings.upload_budget_bytes,
            )
            stack.callback(service.close)
            server = GrpcServer(
                settings.host,
                settings.port,
                advertise_host=settings.advertise_host,
                max_concurrent_rpcs=MAX_CONCURRENT_RPCS,
                identity=who,
                ping_s=PING_S,
            )
            server.add("qaq.v1.Originals", originals_pb2_grpc.add_OriginalsServicer_to_server, service)
            address = await server.start()
            stack.push_async_callback(server.stop)
            info = {"pid": os.getpid()}
            registry = Registry(redis)
            await stack.enter_async_context(registry.announce("originals", address, info))
            await stack.enter_async_context(registry.announce_metrics(measured, "originals", address))
            self._running = stack.pop_all()
        return address

    async def stop(self) -> None:
        """Unregisters, waits for running calls and closes everything."""
        await self._running.aclose()


async def serve(settings: OriginalsSettings) -> None:
    """Runs the service until SIGTERM or SIGINT."""
    log.configure(settings.log_level)
    await run_until_signal(OriginalsServer(settings))
