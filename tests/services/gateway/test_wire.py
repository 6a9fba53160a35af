"""What holds for every HTTP request. No router is needed: nothing here comes so far."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from services.common.routers import Routers, named
from services.common.settings import GatewaySettings
from services.gateway.app import make_app

LIMIT = 100_000
CHAT = "/v1/chat/completions"


def client(app: Any) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://gateway")


def app(**settings: Any) -> Any:
    return make_app(Routers(named("127.0.0.1:1")), GatewaySettings(max_body_bytes=LIMIT, **settings))


def error(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer in OpenAI's format."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    told = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    return told


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[1]",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"user": "\\udc00", "messages": [{"role": "user", "content": "x"}]}',
        b'{"\\ud800": 1, "messages": [{"role": "user", "content": "x"}]}',
        b'{"logit_bias": {"\\ud800": 1}, "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"user": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        b'{"n": 0, "messages": [{"role": "user", "content": "x"}]}',
        b'{"n": ' + b"9" * 10_000 + b', "messages": [{"role": "user", "content": "x"}]}',
        b'{"' + b"x" * 5_000 + b'": 1, "messages": [{"role": "user", "content": "x"}]}',
        json.dumps({"messages": [{"role": "wizard"}] * 1000}).encode(),
        json.dumps({f"f{place}": 1 for place in range(5000)}).encode(),
    ],
)
async def test_bodies_that_are_refused(body: bytes) -> None:
    async with client(app()) as http:
        told = error(await http.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)
        assert told["type"] == "invalid_request_error"
        assert len(told["message"]) < 6000


async def test_long_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield b"x" * 10_000

    async with client(app()) as http:
        headers = {"content-type": "application/json"}
        told = error(await http.post(CHAT, content=b"x" * (LIMIT + 1), headers=headers), 413)
        assert (told["code"], told["type"]) == ("request_too_large", "invalid_request_error")
        assert "send at most 100,000" in told["message"]
        # A length that is said is enough: nothing is read.
        error(await http.post(CHAT, content=b"", headers=headers | {"content-length": str(10**12)}), 413)
        error(await http.post(CHAT, content=endless(), headers=headers), 413)
        assert sent <= LIMIT + 20_000


async def test_what_was_not_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = app()

    @broken.get("/broken")
    async def fail() -> None:
        raise KeyError("a secret")

    async with client(broken) as http:
        answer = await http.get("/broken", headers={"x-request-id": "mine"})
        told = error(answer, 500)
        assert (told["type"], told["code"]) == ("server_error", "internal_error")
        assert "mine" in told["message"]
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] == "mine"
        metrics = (await http.get("/metrics")).text
        assert 'qaq_http_requests_total{path="/broken",status="500"} 1.0' in metrics
        assert "process_resident_memory_bytes" in metrics
        names = {line.split("{")[0].split(" ")[0] for line in metrics.splitlines() if line.startswith("qaq_")}
        own = ("qaq_http_", "qaq_registry_failures_", "qaq_spans_lost_", "qaq_restarts_")
        assert {name for name in names if not name.startswith(own)} == set()  # workers and routers tell theirs


async def test_errors_name_the_field() -> None:
    async with client(app()) as http:
        body = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
        told = error(await http.post(CHAT, json=body), 400)
        assert told["param"].startswith("messages.0.content")
        unknown = error(await http.post(CHAT, json={"messages": [], "grammar": "x"}), 400)
        assert (unknown["param"], unknown["code"]) == ("grammar", "unknown_parameter")
        missing = error(await http.post("/v1/completions", json={}), 400)
        assert (missing["param"], missing["code"]) == ("prompt", "missing_required_parameter")
        unfit = error(await http.post("/v1/completions", json={"prompt": "x", "stream_options": {}}), 400)
        assert (unfit["param"], unfit["code"]) == ("stream_options", "invalid_value")
        error(await http.get("/nothing"), 404)
        error(await http.get(CHAT), 405)


async def test_other_origins() -> None:
    asking = {"origin": "https://page.example", "access-control-request-method": "POST"}
    async with client(app()) as http:
        assert "access-control-allow-origin" not in (await http.get("/version", headers=asking)).headers
    async with client(app(cors_origins="https://page.example, https://other.example")) as http:
        allowed = await http.options(CHAT, headers=asking)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        refused = await http.options(CHAT, headers=asking | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
        broken = await http.post(CHAT, content=b"{", headers=asking | {"content-type": "application/json"})
        assert broken.headers["access-control-allow-origin"] == "https://page.example"


async def test_the_gateways_release() -> None:
    async with client(app()) as http:
        assert set((await http.get("/version")).json()) == {"version"}
