"""Who is registered and what each member says of itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
from qaq.v1 import originals_pb2, originals_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.common.channel import open_channel
from services.common.redis import connect
from services.common.registry import Registry

DEADLINE_S = 5.0


@dataclass(frozen=True)
class StackStatus:
    """Members by address. None for one that is registered but does not answer."""

    routers: list[str]
    workers: dict[str, worker_pb2.DescribeReply | None]
    originals: dict[str, originals_pb2.StatsReply | None]


async def survey(redis_url: str) -> StackStatus:
    """Raises:
    redis.exceptions.RedisError: the registry cannot be read.
    """
    redis = connect(redis_url)
    try:
        registry = Registry(redis)
        routers = [member.address for member in await registry.members("router")]
        workers = [member.address for member in await registry.members("worker")]
        originals = [member.address for member in await registry.members("originals")]
    finally:
        await redis.aclose()
    described = await asyncio.gather(*map(_describe, workers))
    counted = await asyncio.gather(*map(_stats, originals))
    return StackStatus(routers, dict(zip(workers, described, strict=True)), dict(zip(originals, counted, strict=True)))


async def _describe(address: str) -> worker_pb2.DescribeReply | None:
    async with open_channel(address) as channel:
        try:
            stub = worker_pb2_grpc.WorkerStub(channel)
            return await stub.Describe(worker_pb2.DescribeRequest(), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError:
            return None


async def _stats(address: str) -> originals_pb2.StatsReply | None:
    async with open_channel(address) as channel:
        try:
            stub = originals_pb2_grpc.OriginalsStub(channel)
            return await stub.Stats(originals_pb2.StatsRequest(), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError:
            return None
