"""The servers as Ray actors. An actor only hosts its server: all data goes over gRPC."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psutil
import ray
import structlog

from services.cluster.handed import Handed
from services.cluster.logs import Log
from services.cluster.nodes import NAMESPACE, Request, own_address
from services.cluster.restarts import Life
from services.cluster.state import ModelSettings
from services.common.server import Role
from services.common.settings import (
    CommonSettings,
    GatewaySettings,
    OriginalsSettings,
    RouterSettings,
    WorkerSettings,
)

RETRY_PAUSE_S = 2.0
STOP_TIMEOUT_S = 10.0

if TYPE_CHECKING:
    from services.router.server import RouterServer
    from services.worker.server import WorkerServer

log = structlog.get_logger()

S = TypeVar("S", bound=CommonSettings)


class ServerActor(abc.ABC, Generic[S]):
    """Runs one server. Ray calls the constructor again when it restarts the actor.

    Attributes:
        MEMORY_SCORE: added to its share of the machine's memory, in thousandths, when the kernel chooses a process to
            kill because memory is short.
    """

    MEMORY_SCORE = 0

    def __init__(self, settings: S, handed: Handed | None = None, logs: Path | None = None) -> None:
        from services.common import metrics
        from services.common.log import configure

        context = ray.get_runtime_context()
        self._restarted: bool = context.was_current_actor_reconstructed
        name = context.get_actor_name() or type(self).__name__
        if logs is not None:
            log_file = Log(logs, name, again=self._restarted)
            log_file.take()
            self._keeps = asyncio.get_running_loop().create_task(log_file.keep())
        configure(settings.log_level)
        if handed is not None:
            settings = handed.placed(settings, own_address())
        _offer_to_the_kernel(self.MEMORY_SCORE)
        life = Life.of_this_actor(name)
        if life is not None:
            if why := life.begin(restarted=self._restarted):
                log.warning("the server was started again", name=name, why=why, restarts=life.record.restarts)
            metrics.restarts.inc(life.record.restarts)
            self._beats = asyncio.get_running_loop().create_task(life.beat())
        self._life = life
        self._failure = ""
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
                self._failure = str(error)
                if not self._restarted:
                    raise
                log.warning("the server could not restart; trying again", role=type(self).__name__, error=str(error))
                await asyncio.sleep(RETRY_PAUSE_S)
            else:
                self._failure = ""
                log.info("serving", role=type(self).__name__, address=address, pid=os.getpid())
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

    async def facts(self) -> tuple[str, str]:
        """The address, empty until the server is up, and what is in its way."""
        ready = self._address.done() and not self._address.cancelled() and self._address.exception() is None
        return (self._address.result() if ready else "", self._failure)

    async def stop(self) -> None:
        """Stops the server, which gives running calls a moment to end."""
        if self._address.done() and not self._address.cancelled() and self._address.exception() is None:
            await self._server.stop()
        else:
            self._address.cancel()


class RouterActor(ServerActor[RouterSettings]):
    _server: RouterServer

    def _make(self, settings: RouterSettings) -> Role:
        from qaq_core.models import avoid_torch
        from services.router.server import RouterServer

        avoid_torch()
        return RouterServer(settings)

    async def workers(self) -> int:
        """How many workers it sees."""
        return self._server.workers

    async def queued(self) -> dict[str, int]:
        """How many generations wait here, by model."""
        return self._server.queued

    async def serves(self, model: str) -> str | None:
        """Why it cannot serve a model: empty if it can, None if it sees no worker of it yet."""
        return await self._server.serves(model)


class WorkerActor(ServerActor[WorkerSettings]):
    # Its streams go on when it is started again, and it has most of the memory. The others are few and small.
    MEMORY_SCORE = 500
    _server: WorkerServer

    def _make(self, settings: WorkerSettings) -> Role:
        from services.worker.server import WorkerServer

        _use_the_cores()
        self._model = ModelSettings(**settings.model_dump(include=set(ModelSettings.model_fields)))
        return WorkerServer(settings)

    async def hand_over(self) -> int:
        """Drains the server, see `WorkerServer.drain`."""
        return await self._server.drain()

    async def retire(self, limit_s: float) -> bool:
        """Finishes what was accepted, see `WorkerServer.retire`."""
        return await self._server.retire(limit_s)

    async def load(self) -> tuple[int, int, int, bool] | None:
        """Generations that run and that wait, how many run at once, and whether memory is short; None if it takes
        nothing new."""
        return self._server.load

    async def model(self) -> ModelSettings:
        """What it serves, and how."""
        return self._model


class OriginalsActor(ServerActor[OriginalsSettings]):
    def _make(self, settings: OriginalsSettings) -> Role:
        from services.originals.server import OriginalsServer

        return OriginalsServer(settings)


class GatewayActor(ServerActor[GatewaySettings]):
    def _make(self, settings: GatewaySettings) -> Role:
        from services.gateway.server import GatewayServer

        return GatewayServer(settings)


def _use_the_cores() -> None:
    """Ray gives an actor that reserves no CPU a single compute thread; one with none of its own takes the node's cores.

    To be called before torch is imported. What was in the environment of the node stays.
    """
    given = psutil.Process().environ()  # as it was before Ray changed it
    reserved = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    if reserved < 1 and "OMP_NUM_THREADS" not in given:
        os.environ["OMP_NUM_THREADS"] = str(psutil.cpu_count(logical=False) or os.cpu_count() or 1)


def _offer_to_the_kernel(score: int) -> None:
    if score:
        with contextlib.suppress(OSError):  # only Linux has it
            Path("/proc/self/oom_score_adj").write_text(str(score))


def launch(
    name: str,
    actor: type[ServerActor[S]],
    settings: S,
    request: Request | None = None,
    handed: Handed | None = None,
    logs: Path | None = None,
) -> Any:
    """Creates a named actor that outlives its creator and is started again when its process or its node dies.

    Args:
        handed: of a server on another machine.
        logs: where its log is kept; None leaves it to Ray.
    """
    remote: Any = ray.remote(actor)
    options = remote.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=16,
        **(request or Request()).options(),
    )
    return options.remote(settings, handed, logs)


def stop(names: Sequence[str], seconds: float = STOP_TIMEOUT_S) -> None:
    """Stops actors. Each drains its server before its process ends."""
    handles = []
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended already
            handles.append(ray.get_actor(name, namespace=NAMESPACE))
    if handles:
        stopped = [handle.stop.remote() for handle in handles]
        ray.wait(stopped, num_returns=len(stopped), timeout=seconds)
    for handle in handles:
        ray.kill(handle, no_restart=True)
