"""A cache over HTTP, while a chat fills it: what is told, and what may be set."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from qaq.v1 import inspect_pb2
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common.embedded_redis import EmbeddedRedis
from services.gateway.inspection import MAX_EXCEPTIONS, Told
from tests.services.gateway.conftest import running_stack

STORY = "The keeper lit the lamp, wrote the weather in his book — é 🙂 — and counted the ships. " * 8


async def reports(http: httpx2.AsyncClient, path: str) -> AsyncIterator[dict[str, Any]]:
    async with http.stream("GET", path) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


async def test_a_chat_is_watched_and_its_price_is_set(
    redis: Redis, redis_server: EmbeddedRedis, shallow_smollm2: LoadedModel, model_path: Path
) -> None:
    async with (
        running_stack(redis_server, shallow_smollm2, model_path, preset="balanced") as stack,
        httpx2.AsyncClient(base_url=stack.url, timeout=60) as http,
    ):
        session = (await http.post("/v1/sessions")).json()["id"]
        path = f"/v1/sessions/{session}/cache"
        assert (await http.get(path)).json()["cache"] is None
        early = await http.put(path, json={"target_bits": 2})
        assert (early.status_code, early.json()["error"]["code"]) == (400, "failed_precondition")
        body = {"session_id": session, "messages": [{"role": "user", "content": STORY}], "temperature": 0}
        chat = asyncio.create_task(
            http.post("/v1/chat/completions", json=body | {"max_completion_tokens": 40, "ignore_eos": True})
        )
        text: list[str] = []
        async for report in reports(http, f"{path}/events?tokens=4096&columns=8&rate=4"):
            view = report["cache"]
            if view is None:
                continue
            told = view["text"]
            assert told["first"] == len(text)
            text += [token["text"] for token in told["tokens"]]
            assert view["total"] == len(text)
            assert view["cached"] == len(view["key_bits"]) == len(view["requantized"])
            assert view["grid"]["columns"] == min(8, view["cached"])
            if view["phase"] == "idle" and view["cached"]:
                break
        answer = (await chat).json()
        assert STORY in "".join(text)
        assert answer["usage"]["cache"]["kv_bytes"] > 0
        assert answer["choices"][0]["message"]["content"].strip() in "".join(text)

        before = (await http.get(path, params={"tokens": 5, "columns": 1})).json()["cache"]
        assert (before["first"], len(before["key_bits"])) == (before["cached"] - 5, 5)
        assert before["bytes"]["resident"] < before["bytes"]["fp16"]
        half = before["price"]["bits"] / 2
        floor = (await http.put(path, json={"target_bits": half})).json()["lambda_floor"]
        after = (await http.get(path)).json()["cache"]
        assert after["price"]["session_floor"] == after["price"]["lambda"] == floor > before["price"]["own"]
        assert after["price"]["bits"] < 1.1 * half
        assert after["bytes"]["resident"] < before["bytes"]["resident"]
        assert (await http.put(path, json={})).json()["lambda_floor"] == 0

        for params, field in (({"tokens": 0}, "tokens"), ({"columns": 1000}, "columns"), ({"tokens": "x"}, "tokens")):
            refused = await http.get(path, params=params)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        refused = await http.get(f"{path}/events", params={"rate": 5})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rate")
        for wrong, field in (
            ({"target_bits": 0}, "target_bits"),
            ({"lambda_floor": -1}, "lambda_floor"),
            ({"target_bits": 2, "lambda_floor": 1}, None),
            ({"bits": 2}, "bits"),
        ):
            refused = await http.put(path, json=wrong)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text
        for unknown in ("/v1/sessions/nobody/cache", "/v1/sessions/nobody/cache/events"):
            assert (await http.get(unknown)).status_code == 404

        (listed,) = (await http.get("/v1/workers")).json()["data"]  # nobody is asked for a key here
        assert (listed["id"], listed["kv_budget_bytes"]) == (stack.worker, None)
        assert (await http.put(f"/v1/workers/{stack.worker}", json={"kv_budget_bytes": 9 << 20})).status_code == 200
        assert (await http.get("/v1/workers")).json()["data"][0]["kv_budget_bytes"] == 9 << 20
        refused = await http.put(f"/v1/workers/{stack.worker}", json={"kv_budget_bytes": 9})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "kv_budget_bytes")


def report(asked: list[int], answered: list[int], first: int = 0, **more: Any) -> inspect_pb2.CacheReport:
    view = inspect_pb2.CacheView(first=first, asked=asked, answered=answered, **more)
    view.stats.exceptions, view.stats.rows_requantized = sum(asked), sum(answered)
    return inspect_pb2.CacheReport(session_id="s", worker="w", view=view)


def test_exceptions_are_those_since_the_last_report() -> None:
    told = Told()
    assert told.json(report([0, 5], [0, 5]))["cache"]["since"]["asked_at"] == []  # before the watch
    since = told.json(report([0, 7, 3], [0, 6, 0]))["cache"]["since"]
    assert (since["asked_at"], since["answered_at"]) == ([[1, 2], [2, 3]], [[1, 1]])
    assert (since["exceptions"], since["requantized"]) == (5, 1)
    since = told.json(report([8, 3, 4], [7, 3, 0], first=1))["cache"]["since"]
    assert (since["asked_at"], since["answered_at"]) == ([[1, 1], [3, 4]], [[1, 1], [2, 3]])
    moved = report([9] * 9, [9] * 9)
    moved.worker = "another"
    assert told.json(moved)["cache"]["since"]["asked_at"] == []
    many = report([10] * 3000, [9] * 3000)
    many.worker = "another"
    assert len(told.json(many)["cache"]["since"]["asked_at"]) == MAX_EXCEPTIONS


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    told = Told()
    parts = [{"bytes": part} for part in ("🙂".encode()[:2], "🙂".encode()[2:], b"a\xc3")]
    first = told.json(report([], [], text=parts))["cache"]["text"]
    assert [token["text"] for token in first["tokens"]] == ["", "🙂", "a"]
    rest = [{"bytes": b"\xa9"}, {"bytes": b"\xff"}, {"bytes": b"<end>", "special": True}]
    second = told.json(report([], [], text=rest, text_first=3))["cache"]["text"]
    assert [token["text"] for token in second["tokens"]] == ["é", "\ufffd", "<end>"]
    again = told.json(report([], [], text=[{"bytes": b"\xa9"}], text_first=1))["cache"]["text"]
    assert [token["text"] for token in again["tokens"]] == ["\ufffd"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/inspector/main.js", "text/javascript"),
        ("/inspector/style.css", "text/css"),
        ("/inspector/icon.svg", "image/svg+xml"),
    ],
)
async def test_the_page_loads_nothing_from_elsewhere(path: str, kind: str) -> None:
    from services.common.routers import Routers, named
    from services.common.settings import GatewaySettings
    from services.gateway.app import make_app

    app = make_app(Routers(named("127.0.0.1:1")), GatewaySettings())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://page") as http:
        answer = await http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
        assert rules["default-src"] == "'none'"
        assert {rules[f"{what}-src"] for what in ("script", "style", "connect", "img")} == {"'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        for other in ("/inspector/", "/inspector/index.html", "/inspector/../app.py", "/inspector/%2e%2e/app.py"):
            assert (await http.get(other)).status_code == 404
