"""The status of a stack: the registered servers and their load."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
from qaq.v1 import originals_pb2, originals_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.cluster.access import Access
from services.common.channel import open_channel
from services.common.identity import Identity
from services.common.redis import connect
from services.common.registry import SERVERS, Registry

DEADLINE_S = 5.0


@dataclass(frozen=True)
class StackStatus:
    """Servers by address, with their replies; None for a server that does not answer.

    Attributes:
        draining: addresses of the workers that take nothing new.
    """

    routers: list[str]
    workers: dict[str, worker_pb2.DescribeReply | None]
    originals: dict[str, originals_pb2.StatsReply | None]
    draining: frozenset[str] = frozenset()


async def stack_status(access: Access) -> StackStatus:
    """Asks every registered server for its load, as the operator.

    Raises:
        redis.exceptions.RedisError: the registry cannot be read.
    """
    return await status_at(access.settings("operator")["redis_url"], access.identity("operator"))


async def status_at(redis_url: str, who: Identity | None) -> StackStatus:
    """The same for the servers of a Redis, asked by somebody."""
    redis = connect(redis_url, who)
    try:
        registry = Registry(redis)
        routers = [member.address for member in await registry.members("router")]
        members = await registry.members("worker")
        originals = [member.address for member in await registry.members("originals")]
    finally:
        await redis.aclose()
    workers = [member.address for member in members]
    descriptions = await asyncio.gather(*(_describe(address, who) for address in workers))
    stats = await asyncio.gather(*(_stats(address, who) for address in originals))
    draining = frozenset(member.address for member in members if member.draining)
    return StackStatus(
        routers,
        dict(zip(workers, descriptions, strict=True)),
        dict(zip(originals, stats, strict=True)),
        draining,
    )


async def described(routers: list[str], workers: list[str], who: Identity | None) -> StackStatus:
    """The load of workers that are known by their addresses, as far as they answer to `who`."""
    descriptions = await asyncio.gather(*(_describe(address, who) for address in workers))
    return StackStatus(routers, dict(zip(workers, descriptions, strict=True)), {})


async def addresses(access: Access) -> set[str]:
    """Of every registered server.

    Raises:
        redis.exceptions.RedisError: the registry cannot be read.
    """
    redis = connect(access.settings("operator")["redis_url"])
    try:
        registry = Registry(redis)
        return {member.address for kind in SERVERS for member in await registry.members(kind)}
    finally:
        await redis.aclose()


async def _describe(address: str, who: Identity | None) -> worker_pb2.DescribeReply | None:
    async with open_channel(address, who, "worker") as channel:
        try:
            stub = worker_pb2_grpc.WorkerStub(channel)
            return await stub.Describe(worker_pb2.DescribeRequest(), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError:
            return None


async def _stats(address: str, who: Identity | None) -> originals_pb2.StatsReply | None:
    async with open_channel(address, who, "originals") as channel:
        try:
            stub = originals_pb2_grpc.OriginalsStub(channel)
            return await stub.Stats(originals_pb2.StatsRequest(), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError:
            return None
