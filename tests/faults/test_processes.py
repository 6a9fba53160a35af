"""Processes that are killed while they work. Clients see one uninterrupted stream."""

from __future__ import annotations

import asyncio
import os
import sys
import urllib.request
from asyncio.subprocess import PIPE
from collections import Counter
from typing import Any

import grpc
import pytest
from openai import AsyncOpenAI
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from qaq.v1 import common_pb2, generate_pb2, originals_pb2, originals_pb2_grpc, worker_pb2, worker_pb2_grpc
from redis.asyncio import Redis

from services.cluster.stack import python_path
from services.common.channel import open_channel
from services.common.redis import connect
from services.common.settings import GatewaySettings
from services.gateway.server import GatewayServer
from tests.faults.conftest import PAGE_TOKENS, Stack
from tests.faults.hearing import NEW, STORY, Heard, Stub, asked, hear, holder, listen, opened
from tests.faults.processes import Processes


@pytest.fixture
def processes(stack: Stack) -> Processes:
    return stack.processes


def counted(stack: Stack) -> Counter[str]:
    """What the workers have counted: generations that went on for another call, and tokens of prompts."""
    found = Counter[str]()
    for port in stack.metrics:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
            for family in text_string_to_metric_families(reply.read().decode()):
                for sample in family.samples:
                    if sample.name in ("qaq_taken_over_total", "qaq_prompt_tokens_total"):
                        found[sample.name] += int(sample.value)
    return found


async def pages(redis: Redis) -> list[bytes]:
    return [key async for key in redis.scan_iter("qaq:page:*")]


async def until_told(redis: Redis, session: str, count: int) -> None:
    """Waits until the names of so many pages of a session are written down."""
    while await redis.strlen(f"qaq:session:{session}:pages") < 32 * count:  # noqa: ASYNC110 (Redis tells nobody)
        await asyncio.sleep(0.05)


async def test_a_cache_service_that_is_killed_stops_no_stream(stack: Stack, client: Stub) -> None:
    """Its pages wait; the one that comes after it gets them."""

    async def kill() -> None:
        stack.processes.kill(stack.cache_service)

    session = await opened(client, common_pb2.CacheParams(preset="balanced"))
    heard = await hear(client, session, at=8, event=kill)
    assert heard.usage.generated_tokens == NEW
    stack.cache_service = stack.processes.start("originals")
    stack.processes.until_serving(stack.cache_service)
    async with open_channel(stack.cache_service) as channel:
        stub = originals_pb2_grpc.OriginalsStub(channel)
        whole = heard.usage.cache.tokens // PAGE_TOKENS
        while (await stub.Stats(originals_pb2.StatsRequest(), timeout=10)).pages < whole:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    again = await hear(client, session, " Then the ferryman")
    assert again.usage.cache.tokens > heard.usage.cache.tokens


async def test_a_lost_page_is_computed_again(stack: Stack, client: Stub) -> None:
    """Redis loses every page and the worker drops its cache: the next turn computes the log and is right."""
    redis = connect(stack.processes.redis.url)
    whole, session = await opened(client), await opened(client)
    for each in (whole, session):
        await hear(client, each)
    await redis.delete(*await pages(redis))
    async with open_channel(await holder(client, session)) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        assert (await stub.Drop(worker_pb2.DropRequest(session_id=session), timeout=30)).existed
    more = " And on the other bank"
    expected, heard = await hear(client, whole, more), await hear(client, session, more)
    assert heard.usage.loaded_tokens == 0
    assert heard.tokens == expected.tokens
    await redis.aclose()


async def test_a_stream_is_taken_up_after_its_router_was_killed(stack: Stack, client: Stub) -> None:
    """On another router: same tokens, same text, none lost, none repeated, and nothing computed twice."""
    expected, session, heard = await hear(client, await opened(client)), await opened(client), Heard()
    router = stack.processes.start("router")
    stack.processes.until_serving(router)

    async def kill() -> None:
        stack.processes.kill(router)

    async with open_channel(router) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await listen(Stub(channel).Generate(asked(session), timeout=300), heard, NEW // 2, kill)
    assert NEW // 2 <= len(heard.tokens) < NEW
    before = counted(stack)
    rest = generate_pb2.RejoinRequest(session_id=session, received=len(heard.tokens))
    await listen(client.Rejoin(rest, timeout=300), heard)
    assert (heard.tokens, heard.text) == (expected.tokens, expected.text)
    assert (heard.usage.prompt_tokens, heard.usage.generated_tokens) == (expected.usage.prompt_tokens, NEW)
    assert counted(stack) - before == Counter(qaq_taken_over_total=1)  # and no token of a prompt
    assert len((await hear(client, session, " Later")).tokens) == NEW


async def test_a_gateways_client_does_not_notice_that_a_router_was_killed(stack: Stack) -> None:
    """It is in the middle of a stream, which the gateway takes up on another router."""
    processes = stack.processes
    router = processes.start("router")
    processes.until_serving(router)
    gateway = GatewayServer(GatewaySettings(redis_url=processes.redis.url, port=0))
    url = f"http://{await gateway.start()}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as openai:
        name = (await openai.models.list()).data[0].id
        asked: dict[str, Any] = {"model": name, "prompt": STORY, "max_tokens": NEW, "temperature": 0}
        asked["extra_body"] = {"ignore_eos": True, "cache": {"preset": "fp16"}}
        whole = (await openai.completions.create(**asked)).choices[0].text
        other = processes.start("router")  # the gateway stays with the first
        processes.until_serving(other)
        pieces: list[str] = []
        async for chunk in await openai.completions.create(stream=True, **asked):
            pieces += [choice.text for choice in chunk.choices]
            if len(pieces) == NEW // 4:
                processes.kill(router)
    assert "".join(pieces) == whole
    processes.kill(other)
    await gateway.stop()


async def test_the_commands_text_is_whole_when_a_router_was_killed(stack: Stack) -> None:
    """`qaq generate` with two routers, of which the first dies in mid-stream."""
    processes = stack.processes
    routers = [processes.start("router") for _ in range(2)]
    processes.until_serving(*routers)
    options = ("--max-new-tokens", str(NEW), "--temperature", "0", "--ignore-eos", "--preset", "fp16")
    command = [sys.executable, "-m", "services.cli", "generate", STORY, *options, "--router", ",".join(routers)]

    async def started() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *command, env=os.environ | {"PYTHONPATH": python_path()}, stdout=PIPE, stderr=PIPE
        )

    whole, _ = await (await started()).communicate()
    cut = await started()
    assert cut.stdout is not None
    begun = await cut.stdout.read(len(whole) // 4)
    processes.kill(routers[0])
    rest, errors = await cut.communicate()
    assert (begun + rest, cut.returncode) == (whole, 0)
    assert b"looking for another" in errors
    processes.kill(routers[1])
    alone = await started()
    _, errors = await alone.communicate()
    assert alone.returncode == 1
    assert f"no router answers at {', '.join(routers)}" in " ".join(errors.decode().split())


async def test_a_killed_worker_is_not_noticed(stack: Stack, client: Stub) -> None:
    """Resumed on the other worker from stored pages: same tokens, same text, none lost, none repeated."""
    redis = connect(stack.processes.redis.url)
    expected = await hear(client, await opened(client))
    session = await opened(client)

    async def kill() -> None:
        await until_told(redis, session, expected.usage.prompt_tokens // PAGE_TOKENS)
        victim = await holder(client, session)
        stack.processes.kill(victim)
        stack.workers.remove(victim)

    before = REGISTRY.get_sample_value("qaq_resumed_total") or 0.0
    heard = await hear(client, session, at=NEW // 2, event=kill)
    assert (heard.tokens, heard.text) == (expected.tokens, expected.text)
    assert REGISTRY.get_sample_value("qaq_resumed_total") == before + 1
    assert heard.usage.loaded_tokens >= expected.usage.prompt_tokens // PAGE_TOKENS * PAGE_TOKENS
    assert (heard.usage.prompt_tokens, heard.usage.generated_tokens) == (expected.usage.prompt_tokens, NEW)
    assert await holder(client, session) == stack.workers[0]
    assert len((await hear(client, session, " Later")).tokens) == NEW  # and it is at home there
    await redis.aclose()
