"""Keys, tenants and quotas over HTTP: every route, and what OpenAI's client makes of a refusal."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from redis.asyncio import Redis

from services.common.embedded_redis import EmbeddedRedis
from services.common.routers import Routers, named
from services.common.settings import GatewaySettings, RouterSettings
from services.gateway import bodies
from services.gateway.app import make_app
from services.gateway.server import GatewayServer
from services.router.server import RouterServer
from tests.services.router.conftest import CountingWorker, running_worker
from tests.services.tenancy import Tenancy

OPEN = {"/health", "/version", "/metrics"}
"""What needs no key."""

BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/completions"): {"prompt": "Hi", "max_tokens": 1},
    ("POST", "/v1/chat/completions"): {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    ("GET", "/v1/models"): None,
    ("GET", "/v1/models/{name}"): None,
    ("POST", "/tokenize"): {"prompt": "Hi"},
    ("POST", "/detokenize"): {"tokens": [1]},
    ("POST", "/v1/sessions"): {},
    ("GET", "/v1/sessions"): None,
    ("DELETE", "/v1/sessions/{session_id}"): None,
    ("GET", "/v1/sessions/{session_id}/cache"): None,
    ("PUT", "/v1/sessions/{session_id}/cache"): {},
    ("GET", "/v1/sessions/{session_id}/cache/events"): None,
    ("GET", "/v1/workers"): None,
    ("PUT", "/v1/workers/{name}"): {"kv_budget_bytes": 0},
}
"""A request of each other route, which a tenant may send, or an operator."""

OPERATORS = "/v1/workers"


@dataclass
class Keyed:
    """A gateway in front of a router that asks for keys."""

    url: str
    tenancy: Tenancy
    worker: CountingWorker

    def headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.tenancy.keys[name]}"}

    def openai(self, name: str) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.tenancy.keys[name], max_retries=0, timeout=60)


@pytest.fixture
async def keyed(redis: Redis, redis_server: EmbeddedRedis, model_path: Path, tmp_path: Path) -> AsyncIterator[Keyed]:
    tenancy = Tenancy(tmp_path / "tenants.json")
    common = {"redis_url": redis_server.url, "port": 0}
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(running_worker(redis))
        for server in (
            RouterServer(RouterSettings(model=str(model_path), tenants_file=tenancy.path, **common)),
            GatewayServer(GatewaySettings(**common)),
        ):
            address = await server.start()
            stack.push_async_callback(server.stop)
        yield Keyed(f"http://{address}", tenancy, worker)


def routes() -> list[tuple[str, str]]:
    """Every route of the gateway, with its method."""
    paths = make_app(Routers(named("127.0.0.1:1")), GatewaySettings()).openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


async def test_every_route_needs_a_key_but_the_open_ones(keyed: Keyed) -> None:
    asked = {(method, path) for method, path in routes() if path not in OPEN}
    assert asked == set(BODIES)
    async with httpx2.AsyncClient(base_url=keyed.url, timeout=60) as http:
        for path in OPEN:
            assert (await http.get(path)).status_code == 200
        for (method, path), body in BODIES.items():
            path = path.replace("{name}", "counting").replace("{session_id}", "nobody")
            for headers in (
                {},
                keyed.headers("nobody"),
                {"authorization": "Basic YTpi"},
                {"authorization": "Bearer " + "x" * 4000},
                {b"authorization": "Bearer schlüssel".encode()},
                {"x-qaq-tenant": "ada"},
            ):
                answer = await http.request(method, path, json=body, headers=headers)  # type: ignore[arg-type]
                assert answer.status_code == 401, (method, path, headers)
                error = answer.json()["error"]
                assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
                assert "key" in error["message"]
                assert answer.headers["www-authenticate"] == "Bearer"
            for name in ("ada", "root"):
                answer = await http.request(method, path, json=body, headers=keyed.headers(name))
                found = 404 if "nobody" in path or (method, path) == ("PUT", f"{OPERATORS}/counting") else 200
                refused = name == "ada" and path.startswith(OPERATORS)
                assert answer.status_code == (403 if refused else found), (method, path, answer.text)


async def test_a_stream_with_and_without_a_key(keyed: Keyed) -> None:
    asked = {"model": "counting", "prompt": "Hi", "max_tokens": 2, "stream": True}
    async with keyed.openai("nobody") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.completions.create(**asked)
        assert caught.value.code == "invalid_api_key"
    async with keyed.openai("ada") as client:
        chunks = [chunk async for chunk in await client.completions.create(**asked)]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert keyed.worker.asked[-1].tenant == "ada"


async def test_the_tenant_is_that_of_the_key(keyed: Keyed) -> None:
    async with httpx2.AsyncClient(base_url=keyed.url, timeout=60) as http:
        for name, status in (("ada", 200), ("bob", 400)):
            headers = keyed.headers("ada") | {"x-qaq-tenant": name}
            answer = await http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}, headers=headers)
            assert answer.status_code == status, answer.text
    assert [asked.tenant for asked in keyed.worker.asked] == ["ada"]


async def test_another_tenants_session_does_not_exist(keyed: Keyed) -> None:
    async with httpx2.AsyncClient(base_url=keyed.url, timeout=60) as http:
        ada, bob, root = (keyed.headers(name) for name in ("ada", "bob", "root"))
        opened = await http.post("/v1/sessions", headers=ada)  # without a body
        assert opened.status_code == 200, opened.text
        session = opened.json()["id"]
        for method, path, body in (
            ("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 1, "session_id": session}),
            ("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 1, "session_id": session, "stream": True}),
            ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "session_id": session}),
            ("POST", "/v1/sessions", {"branch_of": session}),
            ("DELETE", f"/v1/sessions/{session}", None),
        ):
            answer = await http.request(method, path, json=body, headers=bob)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            said = json.dumps(body).replace(session, "nobody")
            unknown = await http.request(
                method, path.replace(session, "nobody"), json=body and json.loads(said), headers=bob
            )
            assert unknown.status_code == 404
            assert unknown.json()["error"]["message"].replace("nobody", session) == answer.json()["error"]["message"]
            assert "open one with POST /v1/sessions" in answer.json()["error"]["message"]
        assert (await http.get("/v1/sessions", headers=bob)).json()["data"] == []
        assert (await http.get("/v1/sessions", params={"all_tenants": True}, headers=bob)).status_code == 403
        for headers, given in ((ada, {}), (root, {"all_tenants": True})):
            (listed,) = (await http.get("/v1/sessions", params=given, headers=headers)).json()["data"]
            assert (listed["id"], listed["tenant"]) == (session, "ada")
        assert (await http.delete(f"/v1/sessions/{session}", headers=root)).json()["deleted"] is True
        assert (await http.get("/v1/sessions", headers=ada)).json()["data"] == []


async def test_quotas_as_openais_client_expects_them(keyed: Keyed, redis: Redis) -> None:
    keyed.tenancy.limit("ada", requests_per_minute=3, tokens_per_minute=1000)
    asked = {"model": "counting", "prompt": "Hi", "max_tokens": 1}
    async with keyed.openai("ada") as client:
        for left, stream in (("2", False), ("1", True), ("0", False)):
            raw = await client.completions.with_raw_response.create(**asked, stream=stream)
            assert raw.headers["x-ratelimit-limit-requests"] == "3"
            assert raw.headers["x-ratelimit-remaining-requests"] == left
            assert raw.headers["x-ratelimit-limit-tokens"] == "1000"
            assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
            await redis.hset("qaq:quota:ada", "requests_at", "9e9")  # no time passes
            if stream:
                async for _ in raw.parse():
                    pass
        with pytest.raises(openai.RateLimitError, match="has used its 3 requests a minute") as caught:
            await client.completions.create(**asked)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.type == "rate_limit_error"
    told = caught.value.response.headers
    assert 0 < int(told["retry-after"]) <= 60
    assert int(told["retry-after"]) >= int(told["retry-after-ms"]) / 1000
    assert told["x-ratelimit-remaining-requests"] == "0"


async def test_sessions_speak_http(keyed: Keyed) -> None:
    async with httpx2.AsyncClient(base_url=keyed.url, headers=keyed.headers("ada"), timeout=60) as http:
        session = (await http.post("/v1/sessions")).json()["id"]
        body = {"prompt": "Hi", "cache": {"target_bits": 3}, "session_id": session}
        fixed = (await http.post("/v1/completions", json=body)).json()["error"]
        assert fixed["message"].endswith("pass it to POST /v1/sessions")
        gone = await http.delete("/v1/sessions/" + "x" * 200)
        assert (gone.status_code, "POST /v1/sessions" in gone.text) == (400, True)
        for body in ({"other": 1}, [], "x"):
            assert (await http.post("/v1/sessions", json=body)).status_code == 400


HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"


async def first_answer(url: str, headers: dict[str, str]) -> str:
    """What the gateway answers to a request whose body does not come."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"{HEAD}{lines}\r\n".encode())
    raw = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return raw.decode()


async def test_no_body_is_read_of_a_caller_who_may_not_ask(
    keyed: Keyed, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "PAUSE_S", 2.0)
    keyed.tenancy.limit("ada", requests_per_minute=1)
    for headers in ({}, keyed.headers("nobody")):
        assert (await first_answer(keyed.url, headers)).startswith("HTTP/1.1 401 ")
    async with keyed.openai("ada") as client:
        await client.completions.create(model="counting", prompt="Hi", max_tokens=1)
    await redis.hset("qaq:quota:ada", "requests_at", "9e9")  # no time passes
    refused = await first_answer(keyed.url, keyed.headers("ada"))
    assert refused.startswith("HTTP/1.1 429 ")
    assert "has used its 1 requests a minute" in refused
    assert (await first_answer(keyed.url, keyed.headers("bob"))).startswith("HTTP/1.1 408 ")  # its body was waited for


async def test_two_different_keys_are_refused(keyed: Keyed) -> None:
    both = [(b"authorization", f"Bearer {keyed.tenancy.keys[name]}".encode()) for name in ("ada", "bob")]
    async with httpx2.AsyncClient(base_url=keyed.url, timeout=60) as http:
        for method, path, body in (("POST", "/v1/completions", {"prompt": "Hi"}), ("GET", "/v1/sessions", None)):
            answer = await http.request(method, path, json=body, headers=both)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == "authorization has 2 different values; send one"
