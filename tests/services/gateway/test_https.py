"""The gateway over HTTPS: right, foreign, missing, expired and renewed certificates."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qaq_core.base.errors import ConfigError
from services.common import identity as identity_module
from services.common import tls
from services.common.certificates import files, issue
from services.common.embedded_redis import EmbeddedRedis
from services.common.identity import Identity
from services.common.roles import Role
from services.common.settings import GatewaySettings
from services.gateway.server import GatewayServer


@pytest.fixture(autouse=True)
def looked_at_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "CHECK_S", 0.0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    issue(tmp_path / "ours")
    return tmp_path / "ours"


def settings(redis: EmbeddedRedis, place: Path, **more: Any) -> GatewaySettings:
    given = dict(zip(("tls_ca", "tls_cert", "tls_key"), files(place, "gateway"), strict=True))
    return GatewaySettings(redis_url=redis.url, port=0, **given, **more)  # type: ignore[arg-type]


@pytest.fixture
async def public(redis_server: EmbeddedRedis, place: Path) -> AsyncIterator[str]:
    """For clients without certificates."""
    gateway = GatewayServer(settings(redis_server, place))
    yield f"https://{await gateway.start()}/version"
    await gateway.stop()


@pytest.fixture
async def closed(redis_server: EmbeddedRedis, place: Path) -> AsyncIterator[str]:
    """For clients with certificates."""
    gateway = GatewayServer(settings(redis_server, place, client_certificates=True))
    yield f"https://{await gateway.start()}/version"
    await gateway.stop()


def trusting(place: Path, role: Role | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=place / "ca.pem")
    if role is not None:
        context.load_cert_chain(*files(place, role)[1:])
    return context


async def status(url: str, context: ssl.SSLContext) -> int:
    async with httpx2.AsyncClient(verify=context, timeout=10) as http:
        return (await http.get(url)).status_code


async def refused(url: str, context: ssl.SSLContext) -> None:
    with pytest.raises(httpx2.TransportError):
        await status(url, context)


async def test_a_client_that_knows_the_ca(public: str, place: Path, tmp_path: Path) -> None:
    assert await status(public, trusting(place)) == 200
    issue(tmp_path / "foreign")
    await refused(public, trusting(tmp_path / "foreign"))
    await refused(public.replace("https", "http"), trusting(place))


async def test_a_client_with_a_certificate(closed: str, place: Path, tmp_path: Path) -> None:
    assert await status(closed, trusting(place, "client")) == 200
    await refused(closed, trusting(place))
    issue(tmp_path / "foreign")
    context = trusting(place)
    context.load_cert_chain(*files(tmp_path / "foreign", "client")[1:])
    await refused(closed, context)
    issue(place, days=-1 / 86400)
    context = trusting(place, "client")
    issue(place)
    await refused(closed, context)  # it is expired
    async with httpx2.AsyncClient(verify=trusting(place, "worker")) as http:
        answer = await http.get(closed)
    assert answer.status_code == 403
    assert "role may not use the gateway" in answer.json()["error"]["message"]


async def test_everything_is_replaced_while_it_serves(closed: str, place: Path) -> None:
    """The CA too: old and new certificates do not know each other."""
    before = trusting(place, "client")
    async with httpx2.AsyncClient(verify=before) as http:
        assert (await http.get(closed)).status_code == 200
        shutil.rmtree(place)
        issue(place)
        assert await status(closed, trusting(place, "client")) == 200
        await refused(closed, before)
        assert (await http.get(closed)).status_code == 200  # a connection that was there goes on


async def test_a_response_goes_on_when_certificates_are_renewed(place: Path) -> None:
    """Of any server with such a context."""
    going = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"first\n")
        await going.wait()
        writer.write(b"last\n")
        writer.close()

    context = tls.server_context(Identity(*files(place, "gateway")), certificates=True)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    address = server.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address, ssl=trusting(place, "client"))
    assert await reader.readline() == b"first\n"
    shutil.rmtree(place)
    issue(place)
    other, second = await asyncio.open_connection(*address, ssl=trusting(place, "client"))
    assert await other.readline() == b"first\n"
    going.set()
    assert await reader.readline() == b"last\n"
    for each in (writer, second):
        each.close()
    server.close()


async def test_http_in_clear_stays_on_this_machine(redis_server: EmbeddedRedis, place: Path) -> None:
    plain = GatewayServer(settings(redis_server, place, https=False))
    assert await status(f"http://{await plain.start()}/version", trusting(place)) == 200
    await plain.stop()
    with pytest.raises(ConfigError, match="without HTTPS"):
        await GatewayServer(settings(redis_server, place, https=False, host="0.0.0.0")).start()
