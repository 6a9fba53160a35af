"""Bodies of all requests together, and what one of them may be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from services.common.routers import Routers, named
from services.common.settings import GatewaySettings
from services.gateway import bodies
from services.gateway.app import make_app
from services.gateway.bodies import check_values
from tests.services.gateway.test_wire import CHAT, client, error

JSON = {"content-type": "application/json"}


def app(**settings: Any) -> Any:
    return make_app(Routers(named("127.0.0.1:1")), GatewaySettings(**settings))


async def test_all_bodies_together_are_bounded() -> None:
    come, go = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"x" * 600
        come.set()
        await go.wait()

    async with client(app(max_body_bytes=1000, max_bodies_bytes=1000)) as http:
        first = asyncio.create_task(http.post(CHAT, content=slow(), headers=JSON))
        await come.wait()
        refused = await http.post(CHAT, content=b"x" * 600, headers=JSON)
        assert error(refused, 429)["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "2"
        go.set()
        error(await first, 400)
        error(await http.post(CHAT, content=b"x" * 600, headers=JSON), 400)  # as the room is free again


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(list(range(20))).encode(),
        json.dumps(["a"] * 20).encode(),
        json.dumps({str(n): n for n in range(20)}).encode(),
        b"[" + b",".join([b"[]"] * 20) + b"]",
        b'["\\\\",' + b",".join([b"1"] * 20) + b"]",
    ],
)
def test_values_are_bounded(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setattr(bodies, "MAX_VALUES", 15)
    with pytest.raises(HTTPException, match=r"values, .*send at most 15"):
        check_values(body)


@pytest.mark.parametrize(
    "text", ["[{" * 50, ", " * 100, '\\", "\\,' * 100, '{"a": [1, 2]}' * 50, "\\" * 101 + ",,,,,,,,,,,,,,"]
)
def test_text_is_no_value(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(bodies, "MAX_VALUES", 15)
    check_values(json.dumps({"prompt": text, "n": 1}).encode())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text/plain", 'the content-type is "text/plain"; send the body as application/json'),
        ("application/x-www-form-urlencoded", 'the content-type is "application/x-www-form-urlencoded"'),
        ("application/jsonp", 'the content-type is "application/jsonp"'),
        (None, "there is no content-type"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize", "/v1/sessions"])
async def test_another_content_type_is_named(path: str, kind: str | None, said: str) -> None:
    async with client(app()) as http:
        told = error(await http.post(path, content=b"{}", headers={"content-type": kind} if kind else {}), 415)
        assert told["message"].startswith(said)
        assert told["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"])
async def test_json_is_read(kind: str) -> None:
    async with client(app()) as http:
        assert error(await http.post(CHAT, content=b"{}", headers={"content-type": kind}), 400)["param"] == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": 5, "schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"stop": ["x", 5]}, "stop.1"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"n": 0}, "n"),
    ],
)
async def test_param_is_a_place_in_the_body(fields: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    async with client(app()) as http:
        assert error(await http.post(CHAT, json=body), 400)["param"] == param


async def test_every_answer_has_a_request_id() -> None:
    asking = {"origin": "https://page.example", "access-control-request-method": "POST"}
    async with client(app(cors_origins="https://page.example")) as http:
        for answer in (
            await http.options(CHAT, headers=asking),
            await http.options(CHAT, headers=asking | {"origin": "https://evil.example"}),
            await http.get("/docs"),
            await http.head("/version"),
            await http.request("BREW", "/version"),
        ):
            assert answer.headers["x-request-id"]
