"""Networks that are cut or slow, between hosts and between a client and its router."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from qaq.v1 import common_pb2, generate_pb2, worker_pb2, worker_pb2_grpc

from services.common.channel import open_channel
from services.common.embedded_redis import free_port
from services.common.routers import Routers, named
from services.common.streams import Stream
from tests.faults.conftest import PAGE_TOKENS
from tests.faults.hearing import NEW, STORY, Heard, Stub, asked, hear, holder, listen, opened
from tests.faults.network import Host, Proxy
from tests.faults.processes import Processes

_chapters = itertools.count()


@dataclass
class Hosts:
    """A worker and two routers here, and a worker on another host, which reaches Redis by a proxy."""

    processes: Processes
    other: Host
    redis: Proxy
    near: str
    far: str
    far_metrics: str
    routers: list[str]


@pytest.fixture(scope="module")
def hosts(processes: Processes) -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        try:
            other = stack.enter_context(Host())
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            pytest.skip(f"no network namespace can be made here: {error}")
        head, _, at = processes.redis.url.rpartition("@")
        redis = stack.enter_context(Proxy(at.partition("/")[0], other.here))
        # What is not on loopback has a secret, and says that it means to be without TLS.
        apart = {"QAQ_INSECURE": "1", "QAQ_SECRET": "of two hosts and no other"}
        settings = {"QAQ_PAGE_TOKENS": str(PAGE_TOKENS), "QAQ_PREFIX_RECOMPUTE_TOKENS": "1", **apart}
        port = free_port()
        far = {"QAQ_REDIS_URL": f"{head}@{redis.address}/0", "QAQ_METRICS_PORT": str(port)}
        started = [
            processes.start("worker", **settings),
            processes.start("worker", other.there, other.inside, **settings, **far),
            processes.start("originals", other.here, **apart),
            processes.start("router"),
            processes.start("router"),
        ]
        processes.until_serving(*started)
        yield Hosts(processes, other, redis, *started[:2], f"http://{other.there}:{port}/metrics", started[3:])


async def on_the_far_host(client: Stub, hosts: Hosts, opening: str = "") -> tuple[str, str]:
    """A session whose cache is on the other host after a first turn, and that turn's prompt.

    Args:
        opening: the prompt of such a session; another one with it goes to the same host.
    """
    async with asyncio.timeout(200):
        while True:
            prompt = opening or f"Chapter {next(_chapters)}. {STORY}{STORY}"  # long enough to be known again
            session = await opened(client)
            await hear(client, session, prompt)
            if await holder(client, session) == hosts.far:
                return session, prompt


def unacknowledged(hosts: Hosts) -> float:
    with urllib.request.urlopen(hosts.far_metrics, timeout=10) as answer:
        (line,) = [line for line in answer.read().decode().splitlines() if line.startswith("qaq_pages_unacked ")]
    return float(line.split()[1])


async def until_idle(hosts: Hosts) -> None:
    """Waits until the far worker runs nothing and the store has all of its pages."""
    async with open_channel(hosts.far) as channel, asyncio.timeout(300):
        stub = worker_pb2_grpc.WorkerStub(channel)
        while True:
            described = await stub.Describe(worker_pb2.DescribeRequest(), timeout=30, wait_for_ready=True)
            if not described.running + described.waiting and not await asyncio.to_thread(unacknowledged, hosts):
                return
            await asyncio.sleep(0.2)


async def test_a_host_that_is_cut_off_is_as_dead_and_comes_back(hosts: Hosts, client: Stub) -> None:
    more = " And on the other bank"
    whole, opening = await on_the_far_host(client, hosts)
    expected = await hear(client, whole, more)
    session, _ = await on_the_far_host(client, hosts, opening)
    with contextlib.ExitStack() as cable:

        async def cut() -> None:
            cable.enter_context(hosts.other.cut())

        heard = await hear(client, session, more, at=NEW // 2, event=cut)
        assert (heard.tokens, heard.text) == (expected.tokens, expected.text)
        assert await holder(client, session) == hosts.near
    await until_idle(hosts)
    await on_the_far_host(client, hosts)


async def test_a_slow_network_to_redis_slows_no_stream_down(hosts: Hosts, client: Stub) -> None:
    session, _ = await on_the_far_host(client, hosts)
    hosts.redis.delay_s = 0.4
    heard = await hear(client, session, " Later")
    hosts.redis.delay_s = 0.0
    assert heard.usage.generated_tokens == NEW
    assert await holder(client, session) == hosts.far
    await until_idle(hosts)


async def test_a_slow_network_between_hosts_loses_nothing(hosts: Hosts, client: Stub) -> None:
    with contextlib.ExitStack() as cable:
        try:
            cable.enter_context(hosts.other.delayed(200))
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            pytest.skip(f"the network cannot be delayed here: {error}")
        session, _ = await on_the_far_host(client, hosts)
        heard = await hear(client, session, " Later")
    assert heard.usage.generated_tokens == NEW


@pytest.mark.parametrize("kept", [True, False])
async def test_a_client_that_is_cut_off_from_its_router_goes_on_with_another(
    hosts: Hosts, client: Stub, kept: bool
) -> None:
    """The router lives, holds the session and notices nothing."""
    expected = await hear(client, await opened(client))
    request = asked(await opened(client) if kept else "", STORY)
    if not kept:
        request.cache.CopyFrom(common_pb2.CacheParams(preset="fp16"))
    with Proxy(hosts.routers[0]) as between:
        reached = Routers(named(f"{between.address},{hosts.routers[1]}"))
        heard = Heard()

        async def cut() -> None:
            between.silent = True

        await listen(aiter(Stream(reached, request, 300, ())), heard, NEW // 2, cut)
        assert (heard.tokens, heard.text) == (expected.tokens, expected.text)
        between.silent = False
        await reached.close()
    async with asyncio.timeout(300):
        while any(  # noqa: ASYNC110 (nobody tells)
            info.running for info in (await client.ListSessions(generate_pb2.ListSessionsRequest())).sessions
        ):
            await asyncio.sleep(0.2)
