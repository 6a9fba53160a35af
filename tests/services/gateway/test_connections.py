"""Clients that take their time, over real sockets. No router is needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
import uvicorn
from starlette.responses import StreamingResponse

from services.common.routers import Routers, named
from services.common.settings import GatewaySettings
from services.gateway import bodies, connections
from services.gateway.app import make_app
from services.gateway.server import _Server

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """The port of a gateway that also answers /slow, with pauses, and /long, with much."""
    app = make_app(Routers(named("127.0.0.1:1")), GatewaySettings())

    async def parts(count: int, size: int, pause: float) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * size
            await asyncio.sleep(pause)

    @app.get("/slow")
    async def slow() -> StreamingResponse:
        return StreamingResponse(parts(4, 1, 0.3))

    @app.get("/long")
    async def long() -> StreamingResponse:
        return StreamingResponse(parts(1000, 1 << 20, 0))

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=connections.Connection, ws="none", lifespan="off", log_config=None)
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:  # noqa: ASYNC110 (uvicorn sets no event)
            await asyncio.sleep(0.01)
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


async def answer(port: int, request: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what the gateway says before it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    raw = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


async def drip(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"G")
        await asyncio.sleep(0.1)


def error(got: tuple[int, dict[str, str], bytes], status: int) -> dict[str, Any]:
    """The error in an answer, in OpenAI's format and with a request id."""
    assert (got[0], got[1]["connection"]) == (status, "close")
    assert got[1]["x-request-id"]
    told: dict[str, Any] = json.loads(got[2])["error"]
    assert set(told) == {"message", "type", "param", "code"}
    return told


@pytest.mark.parametrize("begun", [b"", b"GET /vers", b"GET /version HTTP/1.1\r\nhost: x\r\n"])
async def test_headers_must_come(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.3)
    async with serving() as port:
        assert "0.3 s" in error(await answer(port, begun), 408)["message"]


async def test_slow_headers_do_not_gain_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the first request nor of the next one on its connection."""
    monkeypatch.setattr(connections, "HEADERS_S", 0.5)
    async with serving() as port:
        first = [b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"]
        for before in ([], first):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for part in before:
                writer.write(part)
                await reader.readuntil(b"}")
            dripping = asyncio.create_task(drip(writer))
            assert b" 408 " in await asyncio.wait_for(reader.readline(), 10)
            dripping.cancel()
            writer.close()


async def test_a_body_must_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PAUSE_S", 0.3)
    async with serving() as port:
        told = error(await answer(port, HEAD + b"content-length: 10\r\n\r\n{"), 408)
        assert "without a pause of 0.3 s" in told["message"]
        assert told["code"] == "request_timeout"


async def test_a_body_must_come_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "WHOLE_S", 0.5)
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"content-length: 100\r\n\r\n")
        dripping = asyncio.create_task(drip(writer))
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 10)
        dripping.cancel()
        writer.close()


async def test_what_is_no_http() -> None:
    async with serving() as port:
        for raw in (b"\x16\x03\x01\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a" * 100_000 + b": x\r\n\r\n"):
            assert "not valid HTTP/1.1" in error(await answer(port, raw), 400)["message"]


async def test_a_body_that_is_no_chunks() -> None:
    async with serving() as port:
        error(await answer(port, HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n"), 400)


BAD_CHUNK = b"transfer-encoding: chunked\r\n\r\nzz\r\n"


@pytest.mark.parametrize("method", [b"HEAD", b"GET", b"POST"])
@pytest.mark.parametrize("path", [b"/version", b"/nothing", b"/detokenize"])
async def test_a_body_that_is_no_chunks_is_no_error_of_the_gateway(
    method: bytes, path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is sent to: also where an answer has no body, and where no body is read."""
    with structlog.testing.capture_logs() as logged:
        async with serving() as port:
            head = method + b" " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            status, headers, body = await answer(port, head + BAD_CHUNK)
            # What its connection was closed for does not end others'.
            assert (await answer(port, b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))[0] == 200
    assert (status, headers["connection"], bool(body)) == (400, "close", method != b"HEAD")
    assert not logged
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    async with serving() as port:
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert "2 connections are open" in error(await answer(port), 503)["message"]
        for _, writer in kept:
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.1)
        assert (await answer(port, b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))[0] == 200


async def test_an_answer_that_pauses_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((connections, "HEADERS_S"), (connections, "UNREAD_S"), (bodies, "PAUSE_S")):
        monkeypatch.setattr(module, name, 0.1)
    async with serving() as port:
        status, _, body = await answer(port, b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (status, body.count(b"x")) == (200, 4)


async def test_an_answer_that_nobody_reads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNREAD_S", 0.3)
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        writer.write(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(1.5)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1 << 30)
        writer.close()


async def test_an_answer_before_the_body_closes() -> None:
    """Whoever goes on sending is not listened to."""
    async with serving() as port:
        head = b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
        assert error(await answer(port, head), 404)["code"] == "not_found"
