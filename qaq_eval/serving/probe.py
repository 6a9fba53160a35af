"""Measurements at the servers of a stack during a load test."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial

import grpc
from qaq.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from redis.asyncio import Redis

from qaq_eval.serving.load import DEADLINE_S, Record
from services.common.channel import open_channel
from services.common.identity import Identity
from services.common.registry import HEARTBEAT_S, Kind, Registry

SAMPLE_S = 0.2
_KINDS: tuple[Kind, ...] = ("router", "worker", "originals", "gateway")


class Probe:
    """Measures the servers that are registered in a Redis.

    Args:
        who: calls workers as a router does; None without TLS.

    Attributes:
        kv_bytes_peak: maximum of the bytes of all workers' caches while watched.
        sessions_at_peak: sessions that held caches at that time.
    """

    def __init__(self, redis: Redis, who: Identity | None = None) -> None:
        self._registry = Registry(redis)
        self._dial = partial(open_channel, identity=who, role="worker")
        self.kv_bytes_peak = self.sessions_at_peak = 0

    async def resident(self) -> dict[str, int]:
        """Resident bytes of each server's process after this call, by "kind address"."""
        await asyncio.sleep(HEARTBEAT_S * 1.5)
        members = [member for kind in _KINDS for member in await self._registry.members(kind)]
        return {f"{member.kind} {member.address}": member.rss_bytes for member in members}

    async def router_ms(self) -> float | None:
        """Median time that recent tokens spent in a router, as it reports after this call."""
        await asyncio.sleep(HEARTBEAT_S * 1.5)
        reported = [member.info.get("relay_ms") for member in await self._registry.members("router")]
        return max((ms for ms in reported if ms is not None), default=None)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Samples the workers' caches during the `with` block."""
        addresses = [member.address for member in await self._registry.members("worker")]
        async with contextlib.AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(self._dial(address)) for address in addresses]
            task = asyncio.create_task(self._watch([worker_pb2_grpc.WorkerStub(c) for c in channels]))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, workers: list[worker_pb2_grpc.WorkerStub]) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):  # the load's records show that a worker is gone
                calls = (worker.Describe(worker_pb2.DescribeRequest(), timeout=5) for worker in workers)
                replies = await asyncio.gather(*calls)
                held = sum(reply.kv_bytes for reply in replies)
                if held > self.kv_bytes_peak:
                    self.kv_bytes_peak, self.sessions_at_peak = held, sum(reply.sessions for reply in replies)
            await asyncio.sleep(SAMPLE_S)

    async def direct(self, tokens: list[int], new: int, cache: common_pb2.CacheParams) -> Record:
        """A generation requested from a worker directly."""
        (worker, *_) = await self._registry.members("worker")
        request = worker_pb2.RunRequest(
            token_ids=tokens,
            sampling=common_pb2.SamplingParams(temperature=0),
            stop=common_pb2.StopParams(max_new_tokens=new, ignore_eos=True),
            cache=cache,
        )
        async with self._dial(worker.address) as channel:
            record = Record(time.perf_counter())
            async for reply in worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=DEADLINE_S):
                if reply.HasField("token"):
                    record.arrived(reply.token.chosen_at)
        return record
