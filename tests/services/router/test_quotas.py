"""Quotas of tenants: over two routers, without leaks, and never in the middle of a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from prometheus_client import REGISTRY
from qaq.v1 import generate_pb2
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.errors import ResourceExhausted
from services.common.settings import RouterSettings
from services.common.tenants import Quotas
from services.router import quotas as module
from services.router.callers import Caller
from services.router.quotas import TenantQuotas
from tests.services.tenancy import Tenancy

from .conftest import CountingWorker, router_channel
from .test_service import replies, request, until

Code = grpc.StatusCode


def of(**limits: int) -> Caller:
    return Caller("ada", quotas=Quotas(**limits))


@pytest.fixture
def tenancy(tmp_path: Path) -> Tenancy:
    return Tenancy(tmp_path / "tenants.json")


@contextlib.asynccontextmanager
async def two_routers(settings: RouterSettings, tenancy: Tenancy) -> AsyncIterator[tuple[Any, Any]]:
    settings = settings.model_copy(update={"tenants_file": tenancy.path})
    async with router_channel(settings) as one, router_channel(settings) as other:
        yield tenancy.stub(one, "ada"), tenancy.stub(other, "ada")


async def exceeded(call: Any) -> tuple[str, dict[str, str]]:
    """The message and the metadata of a refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (replies(call) if hasattr(call, "read") else call)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    told = dict(caught.value.trailing_metadata())
    assert told["qaq-reason"] == "rate_limit_exceeded"
    return caught.value.details(), told


async def test_requests_a_minute_over_two_routers(
    worker: CountingWorker, router_settings: RouterSettings, tenancy: Tenancy, redis: Redis
) -> None:
    tenancy.limit("ada", requests_per_minute=2)
    async with two_routers(router_settings, tenancy) as (one, other):
        left = []
        for client in (one, other):
            call = client.Generate(request())
            assert (await replies(call))[-1].HasField("finished")
            left.append(dict(await call.initial_metadata())["x-ratelimit-remaining-requests"])
        assert left == ["1", "0"]
        await redis.hset("qaq:quota:ada", "requests_at", "9e9")  # no time passes
        for call in (
            one.Generate(request()),
            other.Chat(generate_pb2.ChatRequest(messages=[{"role": "user", "content": "Hi"}])),
            other.Tokenize(generate_pb2.TokenizeRequest(text="x")),
            one.Detokenize(generate_pb2.DetokenizeRequest(token_ids=[1])),
            one.OpenSession(generate_pb2.OpenSessionRequest()),
            one.ListSessions(generate_pb2.ListSessionsRequest()),
        ):
            message, told = await exceeded(call)
            assert "has used its 2 requests a minute" in message
            assert 0 < int(told["retry-after-ms"]) <= 30_000
            assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("2", "0")
        assert (await one.GetModel(generate_pb2.GetModelRequest())).workers == 1
        message, _ = await exceeded(one.GetModel(generate_pb2.GetModelRequest(call_follows=True)))
        assert "has used its 2 requests a minute" in message


async def test_requests_are_counted_before_they_are_read(
    worker: CountingWorker, router_settings: RouterSettings, tenancy: Tenancy, redis: Redis
) -> None:
    """What is refused for its content has cost work too."""
    tenancy.limit("ada", requests_per_minute=100)
    async with two_routers(router_settings, tenancy) as (one, _):
        await one.GetModel(generate_pb2.GetModelRequest(call_follows=True))
        assert await redis.hget("qaq:quota:ada", "requests") is None  # that counts nothing
        chat = generate_pb2.ChatRequest(messages=[{"role": "user", "content": "x"}], tools=["{"])
        both = generate_pb2.TokenizeRequest(text="x", messages=[{"role": "user", "content": "x"}])
        calls: tuple[Callable[[], Awaitable[Any]], ...] = (
            lambda: replies(one.Generate(generate_pb2.GenerateRequest())),
            lambda: replies(one.Chat(chat)),
            lambda: one.Tokenize(both),
            lambda: one.Detokenize(generate_pb2.DetokenizeRequest(token_ids=[-1])),
            lambda: one.OpenSession(generate_pb2.OpenSessionRequest(model="other")),
        )
        for count, call in enumerate(calls, 1):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert caught.value.code() in (Code.INVALID_ARGUMENT, Code.NOT_FOUND)
            assert float(await redis.hget("qaq:quota:ada", "requests")) == 100 - count
            await redis.hset("qaq:quota:ada", "requests_at", "9e9")  # no time passes


async def test_damaged_counts_are_as_if_there_were_none(redis: Redis) -> None:
    quotas = TenantQuotas(redis)
    await redis.hset("qaq:quota:ada", mapping={"requests": "x", "requests_at": "y"})
    await quotas.request(of(requests_per_minute=2))
    await quotas.request(of(requests_per_minute=2))
    with pytest.raises(ResourceExhausted):
        await quotas.request(of(requests_per_minute=2))


async def test_tokens_a_minute_are_counted_afterwards_and_over_two_routers(
    worker: CountingWorker, router_settings: RouterSettings, tenancy: Tenancy
) -> None:
    """Ten are left to the second call, which may use more: what it takes too much delays the next."""
    tenancy.limit("ada", tokens_per_minute=100)
    async with two_routers(router_settings, tenancy) as (one, other):
        asked = generate_pb2.GenerateRequest(prompt_token_ids=[5] * 40, stop={"max_new_tokens": 50})
        await replies(one.Generate(asked))
        await replies(other.Generate(asked))
        message, told = await exceeded(one.Generate(asked))
        assert "has used its 100 tokens a minute" in message
        assert told["x-ratelimit-remaining-tokens"] == "0"
        assert 20_000 < int(told["retry-after-ms"]) <= 60_000  # some 80 tokens too many


async def test_streams_at_a_time_over_two_routers(
    worker: CountingWorker, router_settings: RouterSettings, tenancy: Tenancy
) -> None:
    tenancy.limit("ada", concurrent_streams=2)
    async with two_routers(router_settings, tenancy) as (one, other):
        worker.gate.clear()
        running = [aiter(client.Generate(request())) for client in (one, other)]
        for call in running:
            await anext(call)
        message, told = await exceeded(other.Generate(request()))
        assert "has 2 streams running" in message
        assert told["retry-after-ms"] == "1000"
        assert len(worker.asked) == 2
        worker.gate.set()
        for call in running:
            assert [each async for each in call][-1].HasField("finished")
        for _ in range(4):  # each as soon as the one before has ended
            await replies(one.Generate(request()))


async def test_a_cancelled_stream_gives_its_place_back(
    worker: CountingWorker, router_settings: RouterSettings, tenancy: Tenancy, redis: Redis
) -> None:
    tenancy.limit("ada", concurrent_streams=1, tokens_per_minute=10**6)
    async with two_routers(router_settings, tenancy) as (one, other):
        worker.gate.clear()
        for client in (one, other, one):
            call = client.Generate(request())
            await call.read()
            call.cancel()

            async def free() -> bool:
                return not await redis.exists("qaq:quota:ada:streams")

            await until(free, "the stream's place is free")
        worker.gate.set()


async def test_sessions_at_a_time_over_two_routers(
    worker: CountingWorker, router_settings: RouterSettings, tenancy: Tenancy, redis: Redis
) -> None:
    tenancy.limit("ada", open_sessions=2)
    async with two_routers(router_settings, tenancy) as (one, other):
        opening = generate_pb2.OpenSessionRequest()
        first, second = [(await client.OpenSession(opening)).session_id for client in (one, other)]
        for call in (one.OpenSession(opening), other.OpenSession(generate_pb2.OpenSessionRequest(branch_of=first))):
            assert "has 2 sessions open" in (await exceeded(call))[0]
        assert len([key async for key in redis.scan_iter("qaq:session:*")]) == 2
        await replies(one.Generate(request()))  # a session for one call is none of them
        await redis.delete(f"qaq:session:{first}")  # as if it had expired
        third = (await one.OpenSession(opening)).session_id
        assert (await exceeded(other.OpenSession(opening)))[0]
        await one.CloseSession(generate_pb2.CloseSessionRequest(session_id=second))
        await other.OpenSession(generate_pb2.OpenSessionRequest(branch_of=third))


async def test_the_place_of_a_router_that_died_expires(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_S", 1)
    quotas = TenantQuotas(redis)
    await quotas._admitted("ada", Quotas(concurrent_streams=1), "of a router that died", 0)
    with pytest.raises(ResourceExhausted):
        async with quotas.stream(of(concurrent_streams=1)):
            pass
    await redis.zadd("qaq:quota:ada:streams", {"of a router that died": 1.0})  # its time has passed
    async with quotas.stream(of(concurrent_streams=1)):
        assert await redis.zcard("qaq:quota:ada:streams") == 1
    assert not await redis.exists("qaq:quota:ada:streams")


async def test_a_long_stream_keeps_its_place_and_its_tokens_are_counted_meanwhile(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.02)
    caller = of(concurrent_streams=1, tokens_per_minute=1000)
    async with TenantQuotas(redis).stream(caller) as meter:
        (lease,) = await redis.zrange("qaq:quota:ada:streams", 0, -1)
        await redis.zrem("qaq:quota:ada:streams", lease)  # it expired, while the router stood still
        meter.tokens += 300

        async def counted() -> bool:
            return meter.tokens == 0 and await redis.zscore("qaq:quota:ada:streams", lease) is not None

        await until(counted, "its tokens are counted and it has its place again")
        meter.tokens += 200
    assert 490 <= float(await redis.hget("qaq:quota:ada", "tokens")) <= 510
    assert 0 < await redis.ttl("qaq:quota:ada") <= 91


async def test_what_is_rejoined_may_exceed_its_quotas_as_much_again(redis: Redis) -> None:
    """A stream whose router died is not ended by its quotas, and a client that rejoins for ever is."""
    quotas, caller = TenantQuotas(redis), of(requests_per_minute=2, tokens_per_minute=50, concurrent_streams=1)
    async with quotas.stream(caller), quotas.stream(caller, rejoined=True) as meter:
        meter.tokens += 60
        with pytest.raises(ResourceExhausted, match="streams running"):
            async with quotas.stream(of(concurrent_streams=1), rejoined=True):
                pass
    with pytest.raises(ResourceExhausted):
        async with quotas.stream(caller):
            pass
    async with quotas.stream(caller, rejoined=True) as meter:
        meter.tokens += 60
    with pytest.raises(ResourceExhausted, match="tokens a minute"):
        async with quotas.stream(caller, rejoined=True):
            pass
    with pytest.raises(ResourceExhausted, match="requests a minute"):
        await quotas.request(caller)


async def test_a_bucket_fills_evenly(redis: Redis) -> None:
    quotas, caller = TenantQuotas(redis), of(requests_per_minute=60)
    for _ in range(60):
        await quotas.request(caller)
    with pytest.raises(ResourceExhausted) as caught:
        await quotas.request(caller)
    assert caught.value.retry_after_ms is not None
    assert 0 < caught.value.retry_after_ms <= 1000
    at = float(await redis.hget("qaq:quota:ada", "requests_at"))
    await redis.hset("qaq:quota:ada", "requests_at", str(at - 10))  # ten seconds pass
    for _ in range(10):
        await quotas.request(caller)
    with pytest.raises(ResourceExhausted):
        await quotas.request(caller)


async def test_a_tenant_without_quotas_asks_nothing_of_redis(redis: Redis) -> None:
    async with TenantQuotas(redis).stream(Caller("ada")) as meter:
        meter.tokens += 5
    await TenantQuotas(redis).request(Caller("ada"))
    assert [key async for key in redis.scan_iter("qaq:quota*")] == []


async def test_without_redis_nothing_begins_and_what_runs_goes_on(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.01)
    monkeypatch.setattr("services.common.log._seen", OrderedDict())
    quotas, caller = TenantQuotas(redis), of(tokens_per_minute=1000, concurrent_streams=1)
    count, down = quotas._count, True

    async def answers(**given: Any) -> Any:
        if down:
            raise RedisError("gone")
        return await count(**given)

    before = REGISTRY.get_sample_value("qaq_quota_failures_total") or 0
    with structlog.testing.capture_logs() as logs:
        async with quotas.stream(caller) as meter:
            monkeypatch.setattr(quotas, "_count", answers)
            meter.tokens += 100

            async def failed() -> bool:
                return (REGISTRY.get_sample_value("qaq_quota_failures_total") or 0) > before + 3

            await until(failed, "Redis is asked again and again")
            assert meter.tokens == 100
            down = False
        monkeypatch.setattr(quotas, "_admit", broken)
        with pytest.raises(RedisError):
            async with quotas.stream(caller):
                raise AssertionError("it began")
    assert 890 <= float(await redis.hget("qaq:quota:ada", "tokens")) <= 910
    assert len(logs) == 1


async def broken(**given: Any) -> Any:
    raise RedisError("gone")


async def test_a_call_that_is_cancelled_at_its_end_still_counts(redis: Redis) -> None:
    quotas, caller, entered = TenantQuotas(redis), of(tokens_per_minute=1000, concurrent_streams=1), asyncio.Event()

    async def call() -> None:
        async with quotas.stream(caller) as meter:
            meter.tokens += 100
            entered.set()
            await asyncio.sleep(60)

    running = asyncio.create_task(call())
    await entered.wait()
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([running])

    async def settled() -> bool:
        return not await redis.exists("qaq:quota:ada:streams")

    await until(settled, "its place is free")
    assert 890 <= float(await redis.hget("qaq:quota:ada", "tokens")) <= 910
