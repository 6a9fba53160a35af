"""Generations that wait for a worker: whose turn it is, and how many may wait."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from qaq_core.models import load_tokenizer
from services.common.settings import RouterSettings

from .conftest import running_router, running_worker
from .test_service import Code, replies, request, until


async def until_waiting(count: int) -> None:
    async def waits() -> bool:
        return REGISTRY.get_sample_value("qaq_queue_depth") == count

    await until(waits, f"{count} generations wait")


async def test_tenants_take_turns_for_the_workers_places(redis: Redis, router_settings: RouterSettings) -> None:
    async with running_worker(redis) as worker:
        worker.max_sequences = 1
        worker.gate.clear()
        async with running_router(router_settings) as client:

            def send(prompt: str, tenant: str, **options: float) -> grpc.aio.UnaryStreamCall:
                return client.Generate(request(prompt, 2), metadata=(("qaq-tenant", tenant),), **options)

            first = send("zero", "a")
            await first.read()
            others = []
            for prompt, tenant in (("one", "a"), ("two", "a"), ("three", "a"), ("four", "b")):
                others.append(asyncio.create_task(replies(send(prompt, tenant))))
                await until_waiting(len(others))
            late = send("five", "c", timeout=0.2)
            with pytest.raises(grpc.aio.AioRpcError) as passed:
                await late.read()
            assert passed.value.code() is Code.DEADLINE_EXCEEDED
            others[1].cancel()
            await until_waiting(3)
            assert len(worker.asked) == 1
            worker.gate.set()
            await asyncio.gather(others[0], others[2], others[3])
        tokenizer = load_tokenizer(router_settings.model)
        expected = [tokenizer(prompt)["input_ids"] for prompt in ("zero", "one", "four", "three")]
        assert [list(asked.token_ids) for asked in worker.asked] == expected


async def test_a_full_queue_refuses(redis: Redis, router_settings: RouterSettings) -> None:
    async with running_worker(redis) as worker:
        worker.max_sequences = 1
        worker.gate.clear()
        async with running_router(router_settings.model_copy(update={"max_queue": 1})) as client:
            calls = [client.Generate(request(new=2)) for _ in range(2)]
            await asyncio.wait([asyncio.ensure_future(call.read()) for call in calls], return_when="FIRST_COMPLETED")
            await until_waiting(1)
            bad = request(sampling={"temperature": -1})
            for asked in (request(), bad):  # it is not read before there is room
                with pytest.raises(grpc.aio.AioRpcError, match="1 generations wait already") as refused:
                    await replies(client.Generate(asked))
                assert refused.value.code() is Code.RESOURCE_EXHAUSTED
                assert dict(refused.value.trailing_metadata() or ())["retry-after-ms"]
            worker.gate.set()
            await until_waiting(0)
            with pytest.raises(grpc.aio.AioRpcError, match="temperature is -1") as told:
                await replies(client.Generate(bad))
            assert told.value.code() is Code.INVALID_ARGUMENT
