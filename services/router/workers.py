"""The registered workers of all models, a channel to each, and their load."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import grpc
import structlog
from qaq.v1 import worker_pb2, worker_pb2_grpc
from redis.exceptions import RedisError

from services.common import metrics
from services.common.channel import Dial, open_channel
from services.common.log import once
from services.common.registry import Registry
from services.common.tasks import ended
from services.router.session import Session

REFRESH_S = 1.0
DESCRIBE_DEADLINE_S = DROP_DEADLINE_S = CANCEL_DEADLINE_S = 5.0

log = structlog.get_logger()


class WorkerLink:
    """A worker, and its last description.

    Attributes:
        calls: generations of this router that run on it.
        facts: None until it has answered for the first time.
        retiring: it finishes what was accepted, and then its model is served no more.
    """

    def __init__(self, address: str, dial: Dial) -> None:
        self.address = address
        self.calls = 0
        self.retiring = False
        self.facts: worker_pb2.DescribeReply | None = None
        self._channel = dial(address)
        self.stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._cancelling: set[asyncio.Task[None]] = set()

    @property
    def load(self) -> int:
        """Generations on it. The worker's own count includes those of other routers, but is up to a second old."""
        described = self.facts.running + self.facts.waiting if self.facts else 0
        return max(self.calls, described)

    @property
    def kv_bytes(self) -> int:
        return self.facts.kv_bytes if self.facts else 0

    @property
    def memory_use(self) -> float:
        """Bytes of its caches over its budget; 0 without a budget."""
        budget = self.facts.kv_budget_bytes if self.facts else 0
        return self.kv_bytes / budget if budget else 0.0

    async def refresh(self) -> None:
        """Asks the worker for its facts. Those of a worker that does not answer stay as they are."""
        try:
            self.facts = await self.stub.Describe(worker_pb2.DescribeRequest(), timeout=DESCRIBE_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            if once(f"describe {self.address}"):
                log.warning("a worker does not answer", worker=self.address, status=error.code().name)

    def cancel(self, request: worker_pb2.RunRequest) -> None:
        """Tells the worker that nobody wants a generation any more. Does not wait for it."""
        cancelled = worker_pb2.CancelRequest(session_id=request.session_id, tenant=request.tenant, fence=request.fence)
        task = asyncio.create_task(self._cancel(cancelled), name=f"cancel {request.session_id}")
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel(self, request: worker_pb2.CancelRequest) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):  # it ends by itself
            await self.stub.Cancel(request, timeout=CANCEL_DEADLINE_S)

    async def close(self) -> None:
        if self._cancelling:
            await asyncio.wait(self._cancelling)
        await self._channel.close()


class Workers:
    """Follows the registry. A worker that left it or drains gets no new generations, and finishes those that it runs.

    Attributes:
        refreshed: called after each refresh of the workers and their facts.
        leaving: this router stops; the clients of its generations go on with another one.
    """

    def __init__(self, registry: Registry, dial: Dial = open_channel) -> None:
        self._registry = registry
        self._dial = dial
        self._links: dict[str, WorkerLink] = {}
        self._retired: list[WorkerLink] = []
        self._task: asyncio.Task[None] | None = None
        self.refreshed: Callable[[], None] = lambda: None
        self.leaving = False

    @property
    def ready(self) -> list[WorkerLink]:
        """The workers that can run generations, of all models."""
        return [link for link in self._links.values() if link.facts is not None]

    def get(self, address: str) -> WorkerLink | None:
        return self._links.get(address)

    async def drop(self, session: Session) -> None:
        """Frees a session's cache. A worker that does not answer frees it later, when it needs the memory."""
        link = self.get(session.worker)
        if link is None:
            return
        try:
            asked = worker_pb2.DropRequest(session_id=session.id, tenant=session.tenant)
            await link.stub.Drop(asked, timeout=DROP_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            log.warning("could not drop a cache", worker=link.address, status=error.code().name)

    def leave(self) -> None:
        self.leaving = True

    async def start(self) -> None:
        await self.refresh()
        self._task = asyncio.create_task(self._follow(), name="workers")

    async def stop(self) -> None:
        if self._task is not None:
            await ended(self._task)
        for link in [*self._links.values(), *self._retired]:
            await link.close()
        self._links.clear()

    async def refresh(self) -> None:
        """Updates the list of workers and the facts of each."""
        try:
            members = await self._registry.members("worker")
            found = {member.address: member.retiring for member in members if not member.draining}
        except RedisError as error:
            metrics.registry_failures.inc()
            if once("list workers"):
                log.warning("cannot list the workers; keeping those known", error=str(error))
            found = {address: link.retiring for address, link in self._links.items()}
        for address in found.keys() - self._links.keys():
            self._links[address] = WorkerLink(address, self._dial)
        for address in self._links.keys() - found.keys():
            self._retired.append(self._links.pop(address))
        for address, retiring in found.items():
            self._links[address].retiring = retiring
        await self._close_idle()
        await asyncio.gather(*(link.refresh() for link in self._links.values()))
        self.refreshed()

    async def _close_idle(self) -> None:
        idle = [link for link in self._retired if link.calls == 0]
        self._retired = [link for link in self._retired if link.calls]
        for link in idle:
            await link.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
            except Exception as error:  # whatever it is: a router that stops looking has no worker for good
                metrics.registry_failures.inc()
                if once("follow workers"):
                    log.error("could not refresh the workers; trying again", exc_info=error)
