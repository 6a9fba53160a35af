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
from services.gateway.bodies import Bodies, check_keys, check_values
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
            await http.get("/openapi.json"),
            await http.head("/version"),
            await http.request("BREW", "/version"),
        ):
            assert answer.headers["x-request-id"]


def test_one_caller_does_not_take_all_the_room() -> None:
    held = Bodies(budget=1000, limit=100)
    for _ in range(5):
        held.add("slow", 100)
    with pytest.raises(HTTPException, match="your requests hold 500 bytes, and 500 are left for all"):
        held.add("slow", 1)
    held.add("other", 200)
    with pytest.raises(HTTPException):
        held.add("other", 200)
    held.add("third", 100)
    for caller, size in (("slow", 500), ("other", 200), ("third", 100)):
        held.drop(caller, size)
    assert (held.held, held._of) == (0, {})


def test_a_body_is_taken_whatever_the_room_is() -> None:
    held = Bodies(budget=100, limit=100)
    held.add("one", 60)
    held.add("one", 40)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"content-encoding": "gzip"}, 'the content-encoding is "gzip"; send the body as it is'),
        ({"content-encoding": "identity, br"}, 'the content-encoding is "identity, br"'),
        ({"content-type": "application/json; charset=latin-1"}, 'the charset "latin-1"; send the body in UTF-8'),
        ({"content-type": 'application/json; charset="UTF-16"'}, "charset"),
        ({"content-type": "application/json; charset="}, "charset"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_another_form_of_a_body_is_named(path: str, headers: dict[str, str], said: str) -> None:
    async with client(app()) as http:
        told = error(await http.post(path, content=b"{}", headers=JSON | headers), 415)
        assert said in told["message"]
        for same in ({"content-encoding": "identity"}, {"content-type": 'application/json; charset="utf-8"'}):
            error(await http.post(path, content=b"{}", headers=JSON | same), 400)


@pytest.mark.parametrize(
    "body",
    [
        '{"model": "a", "model": "b", "messages": []}',
        '{"messages": [{"role": "user", "role": "system", "content": "a: b"}]}',
        '{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": {"x": 1, "x": 2}}}}}',
        '{"m\\u006fdel": "a", "model": "b", "messages": []}',
        '{"messages": [], "user": [1, {"a": 1, "a": 2}]}',
    ],
)
async def test_a_key_that_is_there_twice_is_named(body: str) -> None:
    async with client(app()) as http:
        told = error(await http.post(CHAT, content=body.encode(), headers=JSON), 400)
        assert "the body is ambiguous: an object has the key" in told["message"]


def test_colons_in_texts_are_no_keys() -> None:
    for value in ({"a": "b: c", "d": {"a": ["::", {"a": "x"}]}}, [{"a": 1}, {"a": 1}], "::", {}, [1, {"a": ":"}]):
        check_keys(json.dumps(value).encode(), value)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": [True]}, "prompt.0"),
        ("/v1/completions", {"prompt": [[1, False]]}, "prompt.0.1"),
        ("/v1/completions", {"prompt": "x", "max_tokens": True}, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "n": True}, "n"),
        ("/v1/completions", {"prompt": "x", "temperature": False}, "temperature"),
        ("/v1/completions", {"prompt": "x", "seed": True}, "seed"),
        ("/v1/completions", {"prompt": "x", "logprobs": True}, "logprobs"),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": [True]}, "stop_token_ids.0"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"5": True}}, "logit_bias.5"),
        ("/v1/completions", {"prompt": "x", "cache": {"target_bits": True}}, "target_bits"),
        ("/detokenize", {"tokens": [1, True]}, "tokens.1"),
    ],
)
async def test_true_is_no_number(path: str, fields: dict[str, Any], param: str) -> None:
    async with client(app()) as http:
        told = error(await http.post(path, json=fields), 400)
        assert param in (told["param"], told["message"].split()[0]), told
