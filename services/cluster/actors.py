"""The roles as Ray actors. An actor only hosts its role's server: the data goes over gRPC."""

from __future__ import annotations

import abc
import asyncio
from typing import Any, Generic, TypeVar

import ray
import structlog

from services.common.server import Role
from services.common.settings import (
    CommonSettings,
    GatewaySettings,
    OriginalsSettings,
    RouterSettings,
    WorkerSettings,
)

NAMESPACE = "qaq"
RESTART_PAUSE_S = 2.0

log = structlog.get_logger()

S = TypeVar("S", bound=CommonSettings)


class Host(abc.ABC, Generic[S]):
    """Runs one server inside an actor. Ray calls the constructor again when it restarts the actor."""

    def __init__(self, settings: S) -> None:
        from services.common.log import configure

        configure(settings.log_level)
        self._role = self._make(settings)
        self._address = asyncio.get_running_loop().create_task(self._start())

    @abc.abstractmethod
    def _make(self, settings: S) -> Role:
        """The role's server."""

    async def _start(self) -> str:
        """A first start that fails is told to who asked for it; a restart has nobody to tell and goes on."""
        again = ray.get_runtime_context().was_current_actor_reconstructed
        while True:
            try:
                return await self._role.start()
            except Exception as error:
                if not again:
                    raise
                log.warning("could not start again; trying on", role=type(self).__name__, error=str(error))
                await asyncio.sleep(RESTART_PAUSE_S)

    async def address(self) -> str:
        """host:port, once it serves. Raises what the server's start raises."""
        return await asyncio.shield(self._address)

    async def progress(self) -> tuple[str, float]:
        """What it is doing before it serves, and how much of that is done, in [0, 1]."""
        return getattr(self._role, "progress", ("starting", 0.0))

    async def stop(self) -> None:
        """Lets running calls end for a moment and frees everything."""
        if self._address.done() and not self._address.cancelled() and self._address.exception() is None:
            await self._role.stop()
        else:
            self._address.cancel()


class RouterHost(Host[RouterSettings]):
    def _make(self, settings: RouterSettings) -> Role:
        from qaq_core.models import avoid_torch
        from services.router.server import RouterServer

        avoid_torch()
        return RouterServer(settings)


class WorkerHost(Host[WorkerSettings]):
    def _make(self, settings: WorkerSettings) -> Role:
        from services.worker.server import WorkerServer

        return WorkerServer(settings)


class OriginalsHost(Host[OriginalsSettings]):
    def _make(self, settings: OriginalsSettings) -> Role:
        from services.originals.server import OriginalsServer

        return OriginalsServer(settings)


class GatewayHost(Host[GatewaySettings]):
    def _make(self, settings: GatewaySettings) -> Role:
        from services.gateway.server import GatewayServer

        return GatewayServer(settings)


def launch(name: str, host: type[Host[S]], settings: S, *, gpus: float = 0) -> Any:
    """Creates a named actor that outlives its creator and is restarted when its process dies.

    CPUs are not reserved: a role that waits uses none, and a machine may be smaller than its number of roles.
    """
    actor: Any = ray.remote(host)
    options = actor.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        num_gpus=gpus,
        max_concurrency=16,
    )
    return options.remote(settings)
