"""OriginalsServer as a process, and when it cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from services.common.embedded_redis import EmbeddedRedis, free_port
from services.common.redis import RedisUnreachableError
from services.common.registry import Registry
from services.common.secret import SecretMissingError
from services.common.server import PortTakenError
from services.common.settings import OriginalsSettings
from services.originals.server import OriginalsServer

RUN = """
import asyncio
from services.originals.server import OriginalsSettings, serve
asyncio.run(serve(OriginalsSettings()))
"""


async def test_a_process_serves_until_it_is_asked_to_end(redis: Redis, redis_server: EmbeddedRedis) -> None:
    environment = os.environ | {
        "QAQ_REDIS_URL": redis_server.url,
        "QAQ_SECRET": "s" * 64,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN, env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        line = await asyncio.wait_for(process.stderr.readline(), 60)
        (member,) = await Registry(redis).members("originals")
        assert member.info == {"pid": process.pid}
        assert member.address in line.decode()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        assert await Registry(redis).members("originals") == []
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_without_redis_it_says_what_to_do() -> None:
    server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(f"redis://127.0.0.1:{free_port()}/0")))
    with pytest.raises(RedisUnreachableError, match="start it, or correct QAQ_REDIS_URL"):
        await server.start()


async def test_on_a_taken_port_nothing_is_left(redis: Redis, redis_server: EmbeddedRedis) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = OriginalsServer(OriginalsSettings(redis_url=SecretStr(redis_server.url), port=port))
        with pytest.raises(PortTakenError):
            await server.start()
    assert await Registry(redis).members("originals") == []


@pytest.mark.parametrize("changes", [{"host": "0.0.0.0"}, {"redis_url": "redis://10.9.8.7:6379/0"}])
async def test_beyond_loopback_it_needs_a_secret(changes: dict) -> None:
    server = OriginalsServer(OriginalsSettings.model_validate(changes))
    with pytest.raises(SecretMissingError, match="QAQ_SECRET"):
        await server.start()
