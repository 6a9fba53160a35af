"""A stack on a Ray cluster of several raylets: what is done to it, its streams do not notice. `make cluster`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qaq.v1 import common_pb2, generate_pb2

from qaq_core.models.default_model import default_model_path
from services.cluster import state
from services.common.channel import open_channel
from services.common.embedded_redis import EmbeddedRedis
from services.common.keys import authorization
from services.common.redis import connect
from services.common.routers import Routers, registered
from services.common.streams import Stream
from tests.cluster.raylets import Raylets, raylets
from tests.e2e.command import qaq, watched
from tests.faults.hearing import STORY, Heard, listen

pytestmark = [
    pytest.mark.skipif("CLUSTER" not in os.environ, reason="needs `make cluster`"),
    pytest.mark.timeout(3600),
    *(pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.slow),
]

CLIENTS = 3
TOKENS = 48


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """Two nodes, and a stack with a worker on each."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(watched())
        redis = stack.enter_context(EmbeddedRedis(directory=place / "redis"))
        environment = {"QAQ_STATE_DIR": str(place / "state"), "TMPDIR": str(place), "QAQ_REDIS_URL": redis.url}
        nodes = stack.enter_context(raylets(place, environment))
        nodes.add("head")
        nodes.add("second")
        done("up", "--address", nodes.address, "--port", "0", "--workers", "2", "--preset", "fp16")
        yield nodes
        done("down")
        assert "no stack is running" in qaq("status").stderr


def done(*arguments: str) -> str:
    told = qaq(*arguments)
    assert told.returncode == 0, told.stderr
    return told.stdout


def shown(place: Path, *arguments: str) -> dict[str, Any]:
    """What `qaq status` says."""
    done("status", "--json", str(place / "status.json"), *arguments)
    found: dict[str, Any] = json.loads((place / "status.json").read_text())
    return found


def workers(found: dict[str, Any]) -> dict[str, str]:
    """By name, on which nodes those are that serve."""
    servers = found["servers"]
    return {name: servers[name]["node"] for name in servers if name.startswith("worker") and servers[name]["address"]}


@contextlib.asynccontextmanager
async def loaded() -> AsyncIterator[list[Heard]]:
    """Clients stream one answer after the other; each must come whole, and every token in its place.

    Yields:
        the answers that have begun.
    """
    running = state.load()
    assert running is not None
    redis, heard, enough = connect(running.redis["url"]), list[Heard](), asyncio.Event()
    begun = asyncio.Semaphore(0)
    dial = partial(open_channel, identity=running.access.identity("client"), role="router")
    routers = Routers(registered(redis), dial)

    async def begins() -> None:
        begun.release()

    async def client(number: int) -> None:
        while not enough.is_set():
            heard.append(one := Heard())
            request = generate_pb2.GenerateRequest(
                prompt=f"{number}. {STORY}",
                sampling=common_pb2.SamplingParams(temperature=0),
                stop=common_pb2.StopParams(max_new_tokens=TOKENS, ignore_eos=True),
            )
            await listen(aiter(Stream(routers, request, 600, authorization(running.key("client")))), one, 1, begins)
            assert (len(one.tokens), one.usage.generated_tokens) == (TOKENS, TOKENS)

    async with asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(client(number))
        for _ in range(CLIENTS):
            await begun.acquire()
        yield heard
        enough.set()
    await routers.close()
    await redis.aclose()


async def under_load(*steps: Callable[[], Any]) -> int:
    """Does steps while answers stream. Returns the number of answers."""
    async with loaded() as heard:
        for step in steps:
            await asyncio.to_thread(step)
    return len(heard)


def scaled(count: int) -> Callable[[], str]:
    return lambda: done("scale", "--workers", str(count))


async def test_a_node_dies_with_its_worker(cluster: Raylets, tmp_path: Path) -> None:
    """Ray starts the worker again on the node that is left; the streams do not wait for that."""
    second = str(cluster.nodes["second"].node_id)
    assert len(set(workers(shown(tmp_path)).values())) == 2  # each on a node of its own
    (lost,) = (name for name, node in workers(shown(tmp_path)).items() if node == second)
    await under_load(lambda: cluster.kill("second"))
    for _ in range(60):
        found = shown(tmp_path)
        if workers(found).get(lost, second) != second:
            break
        await asyncio.sleep(5)
    assert workers(found)[lost] == str(cluster.nodes["head"].node_id)
    assert found["servers"][lost]["restarts"] == 1
    assert "started again once" in done("status")


async def test_all_workers_are_replaced(cluster: Raylets, tmp_path: Path) -> None:
    before = shown(tmp_path)["workers"]
    await under_load(lambda: done("restart", "workers"))
    after = shown(tmp_path)
    assert len(after["workers"]) == len(workers(after)) == 2
    assert not set(before) & set(after["workers"])


async def test_a_model_is_added_and_removed(cluster: Raylets, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.symlink_to(default_model_path())
    await under_load(lambda: done("models", "add", str(other), "--workers", "2"))
    found = shown(tmp_path)
    assert {"worker-other-0", "worker-other-1"} < set(workers(found))
    assert sorted(each["model"]["name"] for each in found["workers"].values()).count("other") == 2
    assert "Paris" in done("generate", "The capital of France is", "--model", "other", "--temperature", "0")
    await under_load(lambda: done("models", "remove", "other"))
    assert len(workers(shown(tmp_path))) == 2
    assert 'model "other" is not served here' in qaq("generate", "Hi", "--model", "other").stderr


async def test_the_number_of_workers_follows_the_load(cluster: Raylets, tmp_path: Path) -> None:
    """Bounds that ask for a second worker are kept, and a fixed number ends them."""
    done("scale", "--workers", "1", "--max-workers", "2")
    assert "1 to 2 workers, 2 now" in done("status")
    done("scale", "--workers", "2")
    assert "1 to 2 workers" not in done("status")


async def test_a_node_is_drained(cluster: Raylets, tmp_path: Path) -> None:
    """From elsewhere, by the cluster's address alone."""
    head, third = str(cluster.nodes["head"].node_id), cluster.add("third")
    drained = await asyncio.to_thread(partial(shown, tmp_path, "--address", cluster.address))
    assert set(workers(drained).values()) == {head}
    await under_load(lambda: done("drain", head, "--address", cluster.address))
    found = shown(tmp_path)
    assert set(workers(found).values()) == {third}
    assert len(workers(found)) == 2
    assert found["nodes"][head]["drained"]
    assert "of the stack is at nowhere" in qaq("drain", "nowhere", "--address", cluster.address).stderr


async def test_it_is_scaled(cluster: Raylets, tmp_path: Path) -> None:
    await under_load(scaled(1), scaled(3), scaled(1))
    found = shown(tmp_path)
    assert (len(workers(found)), len(found["workers"])) == (1, 1)
