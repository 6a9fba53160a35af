"""The servers as Ray actors. An actor only hosts its server: all data goes over gRPC."""

from __future__ import annotations

import abc
import asyncio
import contextlib
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
import structlog

from services.cluster.restarts import Life
from services.common.server import Role
from services.common.settings import (
    CommonSettings,
    GatewaySettings,
    OriginalsSettings,
    RouterSettings,
    WorkerSettings,
)

NAMESPACE = "qaq"
RETRY_PAUSE_S = 2.0

log = structlog.get_logger()

S = TypeVar("S", bound=CommonSettings)


class ServerActor(abc.ABC, Generic[S]):
    """Runs one server. Ray calls the constructor again when it restarts the actor.

    Attributes:
        MEMORY_SCORE: added to its share of the machine's memory, in thousandths, when the kernel chooses a process to
            kill because memory is short.
    """

    MEMORY_SCORE = 0

    def __init__(self, settings: S) -> None:
        from services.common.log import configure

        configure(settings.log_level)
        context = ray.get_runtime_context()
        self._restarted: bool = context.was_current_actor_reconstructed
        _offer_to_the_kernel(self.MEMORY_SCORE)
        name = context.get_actor_name() or type(self).__name__
        life = Life.of_this_actor(name)
        if life is not None:
            if why := life.begin(restarted=self._restarted):
                log.warning("the server was started again", name=name, why=why, restarts=life.record.restarts)
            self._beats = asyncio.get_running_loop().create_task(life.beat())
        self._life = life
        self._server = self._make(settings)
        self._address = asyncio.get_running_loop().create_task(self._start())

    @abc.abstractmethod
    def _make(self, settings: S) -> Role:
        """The server."""

    async def _start(self) -> str:
        """Starts the server. A failed first start raises. A failed restart is retried: nobody waits for its error."""
        while True:
            try:
                address = await self._server.start()
            except Exception as error:
                if not self._restarted:
                    raise
                log.warning("the server could not restart; trying again", role=type(self).__name__, error=str(error))
                await asyncio.sleep(RETRY_PAUSE_S)
            else:
                if self._life is not None:
                    self._life.serves(address)
                return address

    async def address(self) -> str:
        """The address as host:port, once the server is up. Raises what its start raises."""
        return await asyncio.shield(self._address)

    async def progress(self) -> tuple[str, float]:
        """The current stage of the start and its progress from 0 to 1."""
        return getattr(self._server, "progress", ("starting", 0.0))

    async def draining(self) -> bool:
        """Whether the server takes nothing new any more."""
        return bool(getattr(self._server, "draining", False))

    async def stop(self) -> None:
        """Stops the server, which gives running calls a moment to end."""
        if self._address.done() and not self._address.cancelled() and self._address.exception() is None:
            await self._server.stop()
        else:
            self._address.cancel()


class RouterActor(ServerActor[RouterSettings]):
    def _make(self, settings: RouterSettings) -> Role:
        from qaq_core.models import avoid_torch
        from services.router.server import RouterServer

        avoid_torch()
        return RouterServer(settings)


class WorkerActor(ServerActor[WorkerSettings]):
    # Its streams go on when it is started again, and it has most of the memory. The others are few and small.
    MEMORY_SCORE = 500

    def _make(self, settings: WorkerSettings) -> Role:
        from services.worker.server import WorkerServer

        return WorkerServer(settings)


class OriginalsActor(ServerActor[OriginalsSettings]):
    def _make(self, settings: OriginalsSettings) -> Role:
        from services.originals.server import OriginalsServer

        return OriginalsServer(settings)


class GatewayActor(ServerActor[GatewaySettings]):
    def _make(self, settings: GatewaySettings) -> Role:
        from services.gateway.server import GatewayServer

        return GatewayServer(settings)


def _offer_to_the_kernel(score: int) -> None:
    if score:
        with contextlib.suppress(OSError):  # only Linux has it
            Path("/proc/self/oom_score_adj").write_text(str(score))


def launch(name: str, actor: type[ServerActor[S]], settings: S, *, gpus: float = 0) -> Any:
    """Creates a named actor that outlives its creator and is restarted when its process dies.

    CPUs are not reserved: an idle server uses none, and a machine may have fewer CPUs than servers.
    """
    remote: Any = ray.remote(actor)
    options = remote.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        num_gpus=gpus,
        max_concurrency=16,
    )
    return options.remote(settings)
