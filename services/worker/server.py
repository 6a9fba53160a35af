"""The worker's server, for a process or an actor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import structlog
from qaq.v1 import worker_pb2_grpc
from redis.exceptions import RedisError

from qaq_core import calibration
from qaq_core.models import LoadedModel, compile_layers, device_of, load_model
from services.common import log, metrics, tracing
from services.common.channel import PING_S
from services.common.redis import check, connect
from services.common.registry import Registry
from services.common.secret import check_secret
from services.common.server import GrpcServer, run_until_signal
from services.common.server_identity import identity
from services.common.settings import WorkerSettings
from services.originals.client import RemoteOriginals
from services.worker.inspection import Inspector
from services.worker.scheduler.scheduler import Scheduler
from services.worker.service import WorkerService, model_info

SWITCH_INTERVAL_S = 0.0005
DRAIN_TIMEOUT_S = 5.0
SETTLED_S = 3.0
"""Longer than routers take to hear of what a worker says, and to send what they have accepted until then."""
RETIRING_S = 0.1

_log = structlog.get_logger()


class WorkerServer:
    """Serves one model. Registers itself once it can answer.

    Args:
        loaded: the model, if it is loaded already.

    Attributes:
        progress: the current stage of the start and its progress from 0 to 1.
        draining: it takes nothing new, and is to be stopped.
        retiring: its model is to be served no more; routers send what they have accepted.
    """

    def __init__(self, settings: WorkerSettings, loaded: LoadedModel | None = None) -> None:
        self.progress = ("starting", 0.0)
        self._settings = settings
        self._loaded = loaded
        self._resources, self._registration = AsyncExitStack(), AsyncExitStack()
        self._tell: Callable[[], Awaitable[None]] | None = None
        self.scheduler: Scheduler | None = None
        self.draining = self.retiring = False

    async def start(self) -> str:
        """Loads the model, serves it, and returns the address as host:port.

        Raises:
            RedisUnreachableError, SecretMissingError, ModelLoadError, UnsupportedModelError, ConfigError,
                PortTakenError: the message says what to change. Nothing is left running.
        """
        settings = self._settings
        device_of(settings.device)
        tracing.configure("worker")
        async with AsyncExitStack() as stack:
            stack.push_async_callback(tracing.flush)
            check_secret(settings)
            who = identity(settings)
            measured = stack.enter_context(metrics.serving(settings, who))
            redis = connect(settings.redis_url, who)
            stack.push_async_callback(redis.aclose)
            await check(redis, settings.redis_url)
            loaded = await asyncio.to_thread(self._load)
            originals = RemoteOriginals.registered(
                settings.redis_url, who, secret=settings.secret.get_secret_value(), identity=loaded.identity
            )
            stack.push_async_callback(asyncio.to_thread, originals.close)
            loop = asyncio.get_running_loop()
            scheduler = await asyncio.to_thread(self._prepare, loaded, originals, loop)
            scheduler.start()
            stack.push_async_callback(asyncio.to_thread, scheduler.stop)
            server = GrpcServer(
                settings.host,
                settings.port,
                advertise_host=settings.advertise_host,
                identity=who,
                ping_s=PING_S,  # a session waits for the generation of a router that hangs
            )
            info = model_info(loaded)
            inspector = Inspector(scheduler, loaded, settings.shadow_tokens)
            service = WorkerService(scheduler, inspector, info, settings.max_sequences, settings.orphan_s, self.drain)
            server.add("qaq.v1.Worker", worker_pb2_grpc.add_WorkerServicer_to_server, service)
            address = await server.start()
            stack.push_async_callback(server.stop)
            known = {"pid": os.getpid(), "model": loaded.name, "fingerprint": loaded.fingerprint}

            def facts() -> dict[str, Any]:
                said = {"draining": self.draining, "retiring": self.retiring}
                return known | {fact: True for fact, is_so in said.items() if is_so}

            registry = Registry(redis)
            self._tell = await self._registration.enter_async_context(registry.announce("worker", address, facts))
            await self._registration.enter_async_context(registry.announce_metrics(measured, "worker", address))
            self.scheduler = scheduler
            self._resources = stack.pop_all()
        return address

    @property
    def load(self) -> tuple[int, int, int, bool] | None:
        """Generations that run and that wait, how many run at once, and whether caches are short of memory; None
        before it serves and while it takes nothing new."""
        if self.scheduler is None or self.draining or self.retiring:
            return None
        state, memory = self.scheduler.state, self.scheduler.sessions.memory
        short = memory.lam > 0 or memory.excess_bytes > 0
        return state.running, state.waiting, self._settings.max_sequences, short

    async def drain(self) -> int:
        """Ends each stream with UNAVAILABLE, so that its router continues it on another worker from the stored pages.

        The server stays up, accepts nothing, and says so in the registry. Returns the number of streams.
        """
        self.draining = True
        await self._say()
        return await self._hand_over()

    async def retire(self, limit_s: float) -> bool:
        """Finishes what routers accepted for its model, which is then served no more, and says so in the registry.

        Returns when nothing has run for `SETTLED_S`, in which every router has heard of it; False if that takes longer
        than the limit.
        """
        self.retiring = True
        await self._say()
        ends = time.monotonic() + limit_s
        idle_since = time.monotonic()
        while (now := time.monotonic()) < ends:
            if self.scheduler is not None and (self.scheduler.state.running or self.scheduler.state.waiting):
                idle_since = now
            elif now - idle_since >= SETTLED_S:
                return True
            await asyncio.sleep(RETIRING_S)
        return False

    async def stop(self) -> None:
        """Leaves the registry, hands over what runs, and closes everything."""
        await self._registration.aclose()
        await self._hand_over()
        await self._resources.aclose()

    async def _say(self) -> None:
        """Says in the registry what has changed."""
        if self._tell is not None:
            with contextlib.suppress(RedisError):  # the next heartbeat says it
                await self._tell()

    async def _hand_over(self) -> int:
        return await asyncio.to_thread(self.scheduler.drain, DRAIN_TIMEOUT_S) if self.scheduler else 0

    def _load(self) -> LoadedModel:
        settings = self._settings
        if self._loaded is not None:
            return self._loaded
        loaded = load_model(settings.model, settings.device, settings.dtype, self._report, settings.weights)
        if settings.compiled:
            compile_layers(loaded.model, self._report)
        return loaded

    def _prepare(self, loaded: LoadedModel, originals: RemoteOriginals, loop: asyncio.AbstractEventLoop) -> Scheduler:
        # The scheduler's thread keeps the interpreter busy; by default the event loop waits 5 ms for the lock.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._report("preparing the cache", 0.0)
        with calibration.shown(self._report):
            scheduler = Scheduler(loaded, originals, self._settings, loop)
        scheduler.grammars.prepare()
        self._report("ready", 1.0)
        return scheduler

    def _report(self, stage: str, done: float) -> None:
        self.progress = (stage, done)
        _log.debug("loading", stage=stage, done=done)


async def serve(settings: WorkerSettings) -> None:
    """Runs until SIGTERM or SIGINT."""
    log.configure(settings.log_level)
    await run_until_signal(WorkerServer(settings))
