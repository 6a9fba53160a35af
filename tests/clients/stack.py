"""A stack in threads of this process, for clients that block or are programs of their own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qaq_core.models import LoadedModel
from services.common.embedded_redis import EmbeddedRedis
from services.common.server import Role
from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings
from services.gateway.server import GatewayServer
from services.originals.server import OriginalsServer
from services.router.server import RouterServer
from services.worker.server import WorkerServer

T = TypeVar("T")


@dataclass
class Stack:
    """A Redis server of its own, a cache service, a worker, two routers and a gateway.

    Attributes:
        model: the name of its model.
        url: of OpenAI's API.
        routers: addresses.
    """

    model: str = ""
    url: str = ""
    routers: list[str] = field(default_factory=list)
    _servers: dict[str, Role] = field(default_factory=dict)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def start(self, loaded: LoadedModel, source: str, redis: EmbeddedRedis) -> None:
        threading.Thread(target=self._loop.run_forever, daemon=True, name="stack").start()
        common = {"redis_url": redis.url, "port": 0}
        self.model = loaded.name
        self._start(OriginalsServer(OriginalsSettings(**common)))
        self._start(WorkerServer(WorkerSettings(model=source, **common), loaded))
        router = RouterSettings(model=source, smg=True, **common)
        self.routers = [self._start(RouterServer(router)) for _ in range(2)]
        self.url = f"http://{self._start(GatewayServer(GatewaySettings(**common)))}"

    def stop(self, *addresses: str) -> None:
        """Stops the servers at these addresses, or all, the last one first."""
        for address in addresses or tuple(reversed(self._servers)):
            self.run(self._servers.pop(address).stop())
        if not self._servers:
            self._loop.call_soon_threadsafe(self._loop.stop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for something that runs in the servers' event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _start(self, server: Any) -> str:
        address: str = self.run(server.start())
        self._servers[address] = server
        return address


@contextlib.contextmanager
def running(loaded: LoadedModel, source: str) -> Iterator[Stack]:
    with EmbeddedRedis() as redis:
        stack = Stack()
        try:
            stack.start(loaded, source, redis)
            yield stack
        finally:
            stack.stop()
