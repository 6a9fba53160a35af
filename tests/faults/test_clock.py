"""Clocks that jump. Durations are measured with clocks that do not; Redis lets its keys expire by its own."""

from __future__ import annotations

import ast
import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from qaq.v1 import generate_pb2
from redis.asyncio import Redis

from services.common import registry
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect
from services.common.settings import RouterSettings
from services.router import hold
from tests.services.router.conftest import running_router, running_worker
from tests.services.router.test_outages import rest
from tests.services.router.test_service import replies, request, until

ROOT = Path(__file__).parents[2]
LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
DAYS = 86_400

# What tells people and other programs what time it is; no decision depends on it.
TOLD = {
    "services/cli/top.py": 1,  # when a frame was asked for
    "services/cluster/restarts.py": 3,  # when a server was last seen, as `qaq status` tells
    "services/common/certificates.py": 1,  # from when to when a certificate holds
    "services/common/identity.py": 1,  # whether it has expired
    "services/gateway/replies.py": 1,  # OpenAI's `created`
    "services/worker/generation.py": 1,  # `chosen_at` of a token
    "services/router/sessions.py": 2,  # `opened_at` of a session
    "services/router/vllm_engine.py": 2,  # `received_at` of a request, and a time in a reply
}


def test_nothing_is_decided_by_the_wall_clock() -> None:
    found: dict[str, int] = {}
    for path in sorted((ROOT / "services").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "datetime.now"):
                name = str(path.relative_to(ROOT))
                found[name] = found.get(name, 0) + 1
    assert found == TOLD


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the seconds by which the clock of a Redis that is started now is wrong."""
    if not LIBRARIES:
        pytest.skip("libfaketime is not installed")
    path = tmp_path / "clock"
    path.write_text("+0\n")
    environment = {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(path),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return path


@pytest.fixture
async def redis(clock: Path) -> AsyncIterator[Redis]:
    with EmbeddedRedis() as server:
        for name in ("LD_PRELOAD", "FAKETIME_TIMESTAMP_FILE", "FAKETIME_NO_CACHE", "DONT_FAKE_MONOTONIC"):
            os.environ.pop(name, None)
        client = connect(server.url)
        client.qaq_url = server.url  # type: ignore[attr-defined]
        yield client
        await client.aclose()


@pytest.mark.parametrize("jump", [DAYS, -DAYS])
async def test_a_stream_outlives_a_jump_of_redis_clock(
    redis: Redis, clock: Path, model_path: Path, jump: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards, every key expires at once: as if Redis lost its data. Backwards, none does for a day."""
    monkeypatch.setattr(hold, "REFRESH_S", 0.2)
    monkeypatch.setattr(registry, "HEARTBEAT_S", 0.2)
    settings = RouterSettings(redis_url=redis.qaq_url, port=0, model=str(model_path))  # type: ignore[attr-defined]
    async with running_worker(redis) as worker, running_router(settings) as client:
        worker.gate.clear()
        session = (await client.OpenSession(generate_pb2.OpenSessionRequest())).session_id
        call = client.Generate(request(new=6, session_id=session))
        while (await call.read()).WhichOneof("event") != "token":
            pass
        await asyncio.to_thread(clock.write_text, f"{jump:+d}\n")
        seconds, _ = await redis.time()
        assert abs(seconds - time.time() - jump) < 60
        await asyncio.sleep(0.6)  # a refresh of the hold, a heartbeat
        worker.gate.set()
        assert [reply.WhichOneof("event") for reply in await rest(call)] == ["token"] * 5 + ["finished"]

        async def seen() -> bool:
            return (await client.GetModel(generate_pb2.GetModelRequest())).workers == 1

        await until(seen, "the worker is seen again")
        assert len(await replies(client.Generate(request(" more", new=2, session_id=session)))) == 4
