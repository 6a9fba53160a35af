"""Watching a session's cache, on whatever worker it is, and setting the price of its bits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import grpc
from qaq.v1 import inspect_pb2, inspect_pb2_grpc

from services.common import precision
from services.common.errors import FailedPrecondition, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from services.router import validation
from services.router.callers import Caller, Callers
from services.router.quotas import TenantQuotas
from services.router.sessions import SessionDirectory
from services.router.workers import WorkerLink, Workers

SILENCE_S = 5.0
"""A watch tells at least so often that it goes on."""
LONGEST_S = 3600.0
DEADLINE_S = 10.0
"""Of a call to a worker, which answers between two of its steps."""
MAX_WATCHES, MAX_WATCHES_OF_TENANT = 128, 16
RETRY_AFTER_MS = 1000

_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)

Reprice = Callable[[str, float], None]


@dataclass
class Seen:
    """What one caller has been told of a session.

    Attributes:
        tokens: of its text.
        worker: that had its cache last; empty if none has had it.
    """

    tokens: int = 0
    worker: str = ""
    moves: int = 0


class InspectorService(inspect_pb2_grpc.InspectorServicer):
    """Looks through the router's links to its workers. Keeps no state but the watches.

    Args:
        reprice: called with a session and its new floor, for a generation of it that runs here.
    """

    def __init__(
        self, callers: Callers, quotas: TenantQuotas, sessions: SessionDirectory, workers: Workers, reprice: Reprice
    ) -> None:
        self._callers, self._quotas, self._sessions, self._workers = callers, quotas, sessions, workers
        self._reprice = reprice
        self._watches: Counter[str] = Counter()

    async def InspectCache(
        self, request: inspect_pb2.InspectCacheRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.CacheReport:
        caller = await self._caller(context)
        validation.session_id(request.session_id)
        precision.options(request.options)
        return await self._report(request.session_id, request.options, caller, Seen())

    async def WatchCache(
        self, request: inspect_pb2.WatchCacheRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inspect_pb2.CacheReport]:
        caller = await self._caller(context)
        validation.session_id(request.session_id)
        precision.options(request.options)
        interval_s = precision.interval(request.interval_s, shadow=request.options.shadow)
        seen, last, told, ends = Seen(), b"", 0.0, time.monotonic() + LONGEST_S
        with self._watching(caller.tenant):
            while (now := time.monotonic()) < ends:
                report = await self._report(request.session_id, request.options, caller, seen)
                raw = report.SerializeToString(deterministic=True)
                if raw != last or now - told >= SILENCE_S:
                    last, told = raw, now
                    yield report
                await asyncio.sleep(interval_s)

    async def SetPrecision(
        self, request: inspect_pb2.SetPrecisionRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.SetPrecisionReply:
        caller = await self._caller(context)
        validation.session_id(request.session_id)
        precision.check(request)
        session = await self._sessions.get(request.session_id, _of(caller))
        link = self._workers.get(session.worker)
        if link is None:
            raise FailedPrecondition("no worker has a cache of this session yet; send a prompt to it first")
        asked = inspect_pb2.SetFloorRequest(session_id=session.id, tenant=session.tenant)
        if request.WhichOneof("precision") == "target_bits":
            asked.target_bits = request.target_bits
        else:
            asked.lambda_floor = request.lambda_floor
        try:
            floor = (await link.stub.SetFloor(asked, timeout=DEADLINE_S)).lambda_floor
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                message = "its worker has no cache of this session now; send a prompt to it first"
                raise FailedPrecondition(message) from error
            raise _passed_on(error) from error
        await self._sessions.set_floor(session.id, floor)
        self._reprice(session.id, floor)
        return inspect_pb2.SetPrecisionReply(lambda_floor=floor)

    async def ListWorkers(
        self, request: inspect_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.ListWorkersReply:
        self._operator(await self._caller(context))
        return inspect_pb2.ListWorkersReply(workers=[_listed(link) for link in self._workers.ready])

    async def SetWorkerBudget(
        self, request: inspect_pb2.SetWorkerBudgetRequest, context: grpc.aio.ServicerContext
    ) -> inspect_pb2.SetWorkerBudgetReply:
        self._operator(await self._caller(context))
        precision.budget(request.kv_budget_bytes)
        link = self._workers.get(request.worker)
        if link is None:
            raise NotFound(f'there is no worker "{request.worker[:100]}"; use an address of ListWorkers')
        try:
            await link.stub.SetBudget(
                inspect_pb2.SetBudgetRequest(kv_budget_bytes=request.kv_budget_bytes), timeout=DEADLINE_S
            )
        except grpc.aio.AioRpcError as error:
            raise _passed_on(error) from error
        await link.refresh()
        return inspect_pb2.SetWorkerBudgetReply()

    # -- inside ----------------------------------------------------------------------------------------

    async def _caller(self, context: grpc.aio.ServicerContext) -> Caller:
        """Who calls; the call counts for its quota."""
        caller = self._callers.of(context)
        await self._quotas.request(caller)
        return caller

    def _operator(self, caller: Caller) -> None:
        if not caller.operator and self._callers.asked:
            raise PermissionDenied("the workers are for the key of an operator; `qaq key NAME --operator` makes one")

    @contextlib.contextmanager
    def _watching(self, tenant: str) -> Iterator[None]:
        """One of a bounded number of watches.

        Raises:
            ResourceExhausted: there are as many as there may be.
        """
        if self._watches[tenant] >= MAX_WATCHES_OF_TENANT or self._watches.total() >= MAX_WATCHES:
            raise ResourceExhausted("too many caches are being watched; end a watch", retry_after_ms=RETRY_AFTER_MS)
        self._watches[tenant] += 1
        try:
            yield
        finally:
            self._watches[tenant] -= 1
            self._watches += Counter()  # without those that have none

    async def _report(
        self, identifier: str, options: inspect_pb2.ViewOptions, caller: Caller, seen: Seen
    ) -> inspect_pb2.CacheReport:
        """What a session's cache holds now, and what of its text the caller has not seen.

        Raises:
            NotFound: the caller has no such session.
        """
        session = await self._sessions.get(identifier, _of(caller))
        report = inspect_pb2.CacheReport(session_id=session.id, worker=session.worker)
        if seen.worker not in ("", session.worker):
            seen.moves += 1
        seen.worker, report.moves = session.worker, seen.moves
        link = self._workers.get(session.worker)
        report.unreachable = link is None and bool(session.worker)
        if link is None:
            return report
        known = seen.tokens if session.tenant == caller.tenant else -1
        asked = inspect_pb2.InspectRequest(
            session_id=session.id, tenant=session.tenant, options=options, known_text=known
        )
        try:
            view = await link.stub.Inspect(asked, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (*_GONE, grpc.StatusCode.NOT_FOUND):
                raise _passed_on(error) from error
            report.unreachable = error.code() in _GONE
            return report
        if known > view.total:  # the text was cut: it is told again
            seen.tokens = 0
        elif known >= 0:
            seen.tokens = view.total
        report.view.CopyFrom(view)
        return report


def _of(caller: Caller) -> str | None:
    """Whose sessions a caller may look at; None: all."""
    return None if caller.operator else caller.tenant


def _listed(link: WorkerLink) -> inspect_pb2.WorkerInfo:
    facts = link.facts
    assert facts is not None  # it is ready
    return inspect_pb2.WorkerInfo(
        address=link.address,
        running=facts.running,
        waiting=facts.waiting,
        sessions=facts.sessions,
        max_sequences=facts.max_sequences,
        kv_bytes=facts.kv_bytes,
        kv_budget_bytes=facts.kv_budget_bytes,
        lambda_floor=facts.lambda_floor,
        model=facts.model.name,
    )


def _passed_on(error: grpc.aio.AioRpcError) -> Exception:
    """A worker's error as the caller gets it."""
    if error.code() in _GONE:
        return Unavailable("the session's worker does not answer; try again", retry_after_ms=RETRY_AFTER_MS)
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return FailedPrecondition(error.details() or "the worker refused it")
    return error
