"""Redis' users, on a real server: each does its own work and is refused all else."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import get_args

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from qaq_core.base.errors import ConfigError
from services.common.embedded_redis import EmbeddedRedis
from services.common.redis import connect
from services.common.redis_users import RIGHTS, USERS, User, acl, passwords, write
from services.common.registry import Kind, Registry
from tests import redis_binary

pytestmark = pytest.mark.redis

KINDS: tuple[Kind, ...] = get_args(Kind)
# Commands on what is not theirs, by user. Nobody but `default` may do those of "all".
FOREIGN: dict[str, list[tuple[str, ...]]] = {
    "all": [
        ("KEYS", "*"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("CLIENT", "LIST"),
        ("MONITOR",),
        ("DBSIZE",),
        ("RANDOMKEY",),
        ("SHUTDOWN",),
        ("GET", "another:key"),
        ("PUBLISH", "channel", "x"),
    ],
    "router": [
        ("GET", "qaq:page:00"),
        ("SET", "qaq:codec:00", "x"),
        ("SCAN", "0"),
        ("SMEMBERS", "qaq:members:gateway"),
    ],
    "worker": [
        ("ZRANGE", "qaq:sessions", "0", "-1"),
        ("HGETALL", "qaq:session:a"),
        ("GET", "qaq:session:a:tokens"),
        ("GET", "qaq:page:00"),
        ("SET", "qaq:page:00", "x"),
        ("SCAN", "0"),
    ],
    "originals": [
        ("HGETALL", "qaq:session:a"),
        ("ZRANGE", "qaq:sessions", "0", "-1"),
        ("SET", "qaq:member:worker:a:1", "{}"),
        ("EVAL", "return redis.call('GET', KEYS[1])", "1", "qaq:session:a"),
    ],
    "gateway": [
        ("HGETALL", "qaq:session:a"),
        ("GET", "qaq:page:00"),
        ("SMEMBERS", "qaq:members:worker"),
        ("SCAN", "0"),
    ],
    "operator": [("HGETALL", "qaq:session:a"), ("GET", "qaq:page:00"), ("SCAN", "0")],
    "client": [("HGETALL", "qaq:session:a"), ("GET", "qaq:page:00"), ("SMEMBERS", "qaq:members:worker")],
}
WRITES = [
    ("SREM", "qaq:members:{kind}", "a:1"),
    ("SET", "qaq:member:{kind}:a:1", "{}"),
    ("DEL", "qaq:member:{kind}:a:1"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
async def client(server: EmbeddedRedis, request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    """Of the user that the test names."""
    client = connect(server.url_of(request.getfixturevalue("user")))
    yield client
    await client.aclose()


@pytest.mark.parametrize("user", USERS)
async def test_what_is_not_its_own_is_refused(client: Redis, user: User) -> None:
    assert await client.ping()
    for command in (*FOREIGN["all"], *FOREIGN[user]):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*command)


@pytest.mark.parametrize("user", sorted(set(USERS) - {"router"}))
async def test_a_script_has_the_rights_of_who_runs_it(client: Redis, user: User) -> None:
    with pytest.raises(ResponseError, match=r"NOPERM|can't access|permission"):
        await client.eval("return redis.call('GET', 'qaq:session:a')", 0)


@pytest.mark.parametrize("user", USERS)
async def test_the_registry_of_those_it_finds_and_announces(client: Redis, user: User, server: EmbeddedRedis) -> None:
    rights = RIGHTS[user]
    owner = connect(server.url)
    await owner.sadd("qaq:members:worker", "gone:1")  # it died without a word
    for kind in KINDS:
        if kind in rights.finds:
            await Registry(client).members(kind)
        if kind in rights.finds and redis_binary.version() < (7,):
            continue  # it may read these keys, and so write them
        if kind not in rights.announces:
            with pytest.raises(NoPermissionError):
                async with Registry(client).announce(kind, "a:1", {}):
                    pass
            continue
        async with Registry(client).announce(kind, "a:1", {"fact": 1}):
            assert [member.address for member in await Registry(owner).members(kind)] == ["a:1"]
        assert not await owner.exists(f"qaq:member:{kind}:a:1")
        assert not await owner.sismember(f"qaq:members:{kind}", "a:1")
    await owner.aclose()


@pytest.mark.skipif(redis_binary.version() < (7,), reason="before 7.0 a user that may read a key may write it")
@pytest.mark.parametrize("user", USERS)
async def test_those_it_finds_it_cannot_remove(client: Redis, user: User) -> None:
    for kind in RIGHTS[user].finds:
        for command in WRITES:
            with pytest.raises(NoPermissionError):
                await client.execute_command(*(part.replace("{kind}", kind) for part in command))


async def test_passwords_are_needed_and_kept(server: EmbeddedRedis) -> None:
    url = server.url_of("worker")
    password = url.split("@")[0].rpartition(":")[2]
    assert server.directory is not None
    for path in server.directory.iterdir():
        if path.is_file():
            assert password not in path.read_text(errors="replace")
    assert stat.S_IMODE((server.directory / "users.acl").stat().st_mode) == 0o600
    for wrong in (url.replace(password, "wrong"), url.replace("worker:", "nobody:")):
        client = connect(wrong, retries=0)
        with pytest.raises(AuthenticationError):
            await client.ping()
        await client.aclose()
    other = EmbeddedRedis.attach(server.state())
    assert other.url_of("worker") == url


def test_the_rights_of_redis_7_are_narrower() -> None:
    given = passwords()
    new, old = acl(given, (7, 0, 15)), acl(given, (6, 2, 14))
    assert "%R~qaq:members:originals" in new
    assert "%R~" not in old
    assert all(password not in new for password in given.values())


def test_a_deployments_users(tmp_path: Path) -> None:
    write(tmp_path / "made", "rediss://redis:6379/0", (8,))
    users = (tmp_path / "made" / "redis" / "users.acl").read_text()
    assert len(users.splitlines()) == 1 + len(USERS)
    line = (tmp_path / "made" / "worker" / "redis.env").read_text()
    assert line.startswith("QAQ_REDIS_URL=rediss://worker:")
    assert line.endswith("@redis:6379/0\n")
    assert stat.S_IMODE((tmp_path / "made" / "worker" / "redis.env").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="there already"):
        write(tmp_path / "made", "rediss://redis:6379/0", (8,))
