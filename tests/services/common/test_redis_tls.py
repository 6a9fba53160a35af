"""rediss:// with certificates of both sides, through a proxy that speaks TLS for Redis."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as Unreachable

from services.common import identity as identity_module
from services.common import tls
from services.common.certificates import files, issue
from services.common.embedded_redis import EmbeddedRedis
from services.common.identity import Identity
from services.common.redis import connect
from services.common.roles import Role

pytestmark = pytest.mark.redis


@pytest.fixture(autouse=True)
def looked_at_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "CHECK_S", 0.0)


class Proxy:
    """Ends TLS in front of a Redis."""

    def __init__(self, redis_url: str) -> None:
        self._port = int(redis_url.rpartition(":")[2].partition("/")[0])
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Ends every connection."""
        for writer in self._open:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, back}
        await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()


def of(directory: Path, role: Role) -> Identity:
    return Identity(*files(directory, role))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    issue(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
async def proxy(redis_server: EmbeddedRedis, place: Path) -> AsyncIterator[tuple[str, Proxy]]:
    """The URL of a Redis that asks for certificates."""
    proxy = Proxy(redis_server.url)
    context = tls.server_context(of(place, "redis"), certificates=True)
    listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=context)
    host = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield f"rediss://{redis_server.url.removeprefix('redis://').rpartition('@')[0]}@{host}/0", proxy
    proxy.cut()
    listening.close()


async def refused(client: Redis) -> None:
    with pytest.raises(Unreachable):
        await client.ping()
    await client.aclose()


async def test_right_foreign_and_missing_certificates(proxy: tuple[str, Proxy], place: Path, tmp_path: Path) -> None:
    url, _ = proxy
    client = connect(url, of(place, "worker"))
    assert await client.ping()
    await client.aclose()
    ca, cert, key = files(place, "worker")
    named = connect(f"{url}?ssl_ca_certs={ca}&ssl_certfile={cert}&ssl_keyfile={key}")
    assert await named.ping()
    await named.aclose()
    issue(tmp_path / "foreign")
    await refused(connect(url, of(tmp_path / "foreign", "worker"), retries=0))
    await refused(connect(url, Identity(ca), retries=0))
    await refused(connect(url, retries=0))


async def test_connections_after_a_renewal_have_the_new_certificates(proxy: tuple[str, Proxy], place: Path) -> None:
    url, between = proxy
    client = connect(url, of(place, "worker"))
    await client.set("before", "1")
    shutil.rmtree(place)
    issue(place)
    assert await client.get("before") == b"1"  # the connection goes on
    between.cut()
    assert await client.get("before") == b"1"
    await client.aclose()
