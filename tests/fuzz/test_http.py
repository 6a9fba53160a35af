"""Every HTTP route of the gateway, by its table of routes and their schemas, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import quote

import pytest

from services.common.routers import Routers, named
from services.common.settings import GatewaySettings
from services.gateway.app import make_app
from tests.fuzz.conftest import GROWTH, LONG, SEED, Fuzzed, resident
from tests.fuzz.generators import Json

REQUESTS = LONG or 100
TOGETHER = 8
ANSWER_S = 90.0
METHODS = ("HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "CONNECT", "BREW", "get", "POST", "GET", "DELETE")
TYPES = (
    "text/plain",
    "",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonp",
    "é",
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HINTS: dict[str, Any] = {
    "model": ["", "tiny", None],
    "prompt": ["Hello", ["Hello", "there"], [1, 2, 3], [[1, 2], "x"]],
    "messages": [
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    ],
    "role": ["user", "system", "assistant", "tool", "developer"],
    "content": ["Hello", None],
    "n": [1, 1, 2, 8, 9, 0],
    "max_tokens": [1, 2, 3, 0],
    "max_completion_tokens": [1, 2],
    "min_tokens": [0, 1],
    "temperature": [0, 1, 0.5],
    "top_p": [1, 0.5],
    "logit_bias": [{"5": 1}, {"5": 101}, {"x": 1}],
    "stop": ["x", ["x", "y"]],
    "stop_token_ids": [[5]],
    "session_id": ["", "no such session"],
    "branch_of": [""],
    "tokens": [[1, 2, 3]],
    "preset": ["fp16", "paper"],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        {"type": "json_schema"},
    ],
    "guided_regex": ["[a-z]{1,3}"],
    "guided_grammar": ['root ::= "a" | "b" root'],
    "guided_choice": [["yes", "no"]],
    "guided_json": [SCHEMA],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}], []],
    "tool_choice": ["auto", "none"],
}
# In place of the names in paths.
PATHS = ("no-such", "%ff%fe", "a%2fb", "..%2f..%2fetc", quote("é🙂"), "x" * 3000, "%00")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def routes() -> tuple[list[tuple[str, str, Any]], dict[str, Any]]:
    """Path, method and schema of the body of every route, and the schemas that they name."""
    made = make_app(Routers(named("127.0.0.1:1")), GatewaySettings()).openapi()
    found = []
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            found.append((path, method.upper(), content.get("application/json", {}).get("schema")))
    return found, made["components"]["schemas"]


class Client:
    """Sends what it makes up, and notes every answer that must not be."""

    def __init__(self, address: str, seed: int) -> None:
        self._host, _, port = address.rpartition(":")
        self._port, self._random = int(port), Random(seed)
        self._routes, schemas = routes()
        self._json = Json(self._random, schemas, HINTS)
        self.statuses: Counter[int | str] = Counter()
        self.wrong: list[str] = []

    async def one(self) -> None:
        raw, leave = self._request()
        try:
            answer = await asyncio.wait_for(self._send(raw, leave), ANSWER_S)
        except TimeoutError:
            self.wrong.append(f"no answer <- {raw[:600]!r}")
            return
        self.statuses[answer.status if answer else "left"] += 1
        if answer is not None and (why := _wrong(answer)):
            self.wrong.append(f"{why}: {answer.status} {answer.body[:300]!r} <- {raw[:600]!r}")

    async def _send(self, raw: bytes, leave: bool) -> Answer | None:
        """The answer; None if the client leaves before it."""
        random = self._random
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            cut = random.randrange(len(raw))
            with contextlib.suppress(ConnectionError):
                for part in (raw[:cut], raw[cut:]) if random.random() < 0.2 else (raw,):
                    writer.write(part)
                    await writer.drain()
                if leave:
                    await asyncio.sleep(random.choice((0.0, 0.01, 0.1)))
                    return None
                return _answer(await reader.read(-1))
            return None  # refused before it had read everything
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _request(self) -> tuple[bytes, bool]:
        """A request, and whether the client leaves before the answer."""
        random = self._random
        if random.random() < 0.04:
            return self._no_http(), random.random() < 0.5
        path, method, schema = random.choice(self._routes)
        if random.random() < 0.08:
            method = random.choice(METHODS)
        for name in ("{name}", "{session_id}"):
            path = path.replace(name, random.choice(PATHS))
        path += random.choice(("", "", "", "?x=%ff&y", "?" + "a=b&" * 100))
        body = b"" if schema is None and random.random() < 0.8 else self._json.text(schema or {})
        headers = ["host: x", "connection: close"]
        kind = "application/json" if random.random() < 0.9 else random.choice(TYPES)
        if body or schema:
            headers.append(f"content-type: {kind}")
        headers += self._strange_headers()
        if random.random() < 0.1:
            headers.append("transfer-encoding: chunked")
            body = self._chunked(body)
        elif random.random() < 0.03:
            headers.append(f"content-length: {random.choice((-1, 10**12, 10**30, 'x', len(body) + 1))}")
        elif body or method == "POST":
            headers.append(f"content-length: {len(body)}")
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{header}\r\n" for header in headers) + "\r\n"
        raw = head.encode("utf-8") + body
        short = f"content-length: {len(body) + 1}" in headers or "10000" in head
        return raw, random.random() < 0.08 or short

    def _strange_headers(self) -> list[str]:
        random = self._random
        if random.random() < 0.8:
            return []
        return [
            random.choice(
                (
                    "x-request-id: mine",
                    "x-request-id: " + "x" * 500,
                    "x-qaq-tenant: " + "x" * 200,
                    "x-qaq-tenant: é",
                    "authorization: Bearer x",
                    "expect: 100-continue",
                    "upgrade: websocket",
                    "origin: http://evil.example",
                    "accept-encoding: \x7f",
                    "cookie: " + "a" * 10_000,
                    "a" * 70_000 + ": x",
                    "no colon",
                    "content-encoding: gzip",
                )
            )
        ]

    def _chunked(self, body: bytes) -> bytes:
        cut = self._random.randrange(len(body) + 1)
        parts = [part for part in (body[:cut], body[cut:]) if part]
        made = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        return made if self._random.random() < 0.8 else made.replace(b"\r\n", b"\n", 1)

    def _no_http(self) -> bytes:
        return (
            self._random.choice(
                (
                    self._random.randbytes(200),
                    b"GET /\r\n\r\n",
                    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                    b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
                    b"GET http://[ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
                    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n"
                    b"content-length: 3\r\n\r\n{}}",
                )
            )
            + b"\r\n\r\n"
        )


def _answer(raw: bytes) -> Answer | None:
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head:
        return None  # closed without a word, as for what is no HTTP
    first, *lines = head.decode("latin-1").split("\r\n")
    if first.split()[1] == "100":
        return _answer(body)
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _joined(body)
    elif "content-length" in headers:
        body = body[: int(headers["content-length"])]  # the next answer may follow
    return Answer(int(first.split()[1]), headers, body)


def _joined(raw: bytes) -> bytes:
    made = b""
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            break
        made, raw = made + rest[:length], rest[length + 2 :]
    return made


def _wrong(answer: Answer) -> str | None:
    """What is wrong with an answer; None if it may be."""
    if not answer.headers.get("x-request-id"):
        return "no request id"
    if answer.status in (500, 502, 503):
        return "an error of the server's"
    if answer.status < 400 or not answer.body:  # HEAD
        return None
    try:
        told = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return "not an error in OpenAI's format"
    return None if set(told) == {"message", "type", "param", "code"} else "not an error in OpenAI's format"


async def run(stack: Fuzzed, requests: int, seed: int) -> Client:
    client = Client(stack.addresses["gateway"], seed)

    async def some() -> None:
        while client.statuses.total() + len(client.wrong) < requests:
            await client.one()

    await asyncio.gather(*(some() for _ in range(TOGETHER)))
    return client


@pytest.mark.timeout(120 + LONG)
async def test_whatever_is_sent_is_answered(fuzzed: Fuzzed) -> None:
    await run(fuzzed, REQUESTS // 4, seed=0)
    await fuzzed.check()
    before = await resident()
    client = await run(fuzzed, REQUESTS, seed=SEED)
    print(dict(client.statuses))
    assert not client.wrong, "\n".join(client.wrong[:20])
    assert min(client.statuses[200], client.statuses[400]) > 0, "some requests are valid, others are not"
    await fuzzed.check()
    growth = await resident() - before
    print(f"{growth >> 20} MB more than {before >> 20}")
    assert growth < GROWTH


def test_every_route_is_known() -> None:
    found, schemas = routes()
    assert {path for path, _, _ in found} >= {"/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/sessions"}
    assert schemas
