"""Several models behind one gateway, over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import openai as api
import pytest
from openai import AsyncOpenAI
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import WorkerSettings
from services.worker.server import WorkerServer
from tests.services.gateway.conftest import Served, running_stack

SMALL = "shallow"
HI = {"prompt": "Hi", "max_tokens": 2}


@pytest.fixture
async def two(
    redis: Redis,
    redis_server: EmbeddedRedis,
    smollm2: LoadedModel,
    shallow_smollm2: LoadedModel,
    model_path: Path,
    tmp_path: Path,
) -> AsyncIterator[Served]:
    """A stack with one more worker, of another model."""
    path = tmp_path / f"{SMALL}.gguf"
    path.symlink_to(model_path)
    small = dataclasses.replace(shallow_smollm2, name=SMALL, source=str(path))
    settings = WorkerSettings(model=str(path), preset="fp16", redis_url=redis_server.url)
    worker = WorkerServer(settings, small)
    await worker.start()
    try:
        async with running_stack(redis_server, smollm2, model_path) as stack:
            yield stack
    finally:
        await worker.stop()


@pytest.fixture
async def client(two: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{two.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


async def test_the_models_are_listed_and_answer_by_name(client: AsyncOpenAI, two: Served) -> None:
    assert [each.id for each in (await client.models.list()).data] == [two.model, SMALL]
    assert (await client.models.retrieve(SMALL)).id == SMALL
    answers = await asyncio.gather(*(client.completions.create(model=name, **HI) for name in (two.model, SMALL, "")))
    assert [each.model for each in answers] == [two.model, SMALL, two.model]
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 2}
    assert (await client.chat.completions.create(model=SMALL, **asked)).model == SMALL
    with pytest.raises(api.NotFoundError, match=f'"large" is not served here; use "{two.model}" or "{SMALL}"') as none:
        await client.completions.create(model="large", **HI)
    assert none.value.code == "model_not_found"


async def test_a_session_answers_with_its_model(client: AsyncOpenAI, two: Served) -> None:
    async with httpx2.AsyncClient(base_url=two.url, timeout=60) as http:
        session = (await http.post("/v1/sessions", json={"model": SMALL})).json()["id"]
        body = HI | {"session_id": session}
        assert (await http.post("/v1/completions", json=body)).json()["model"] == SMALL
        other = await http.post("/v1/completions", json=body | {"model": two.model})
        assert other.status_code == 400
        assert f'is of the model "{SMALL}"' in other.json()["error"]["message"]
        (listed,) = (await http.get("/v1/sessions")).json()["data"]
        assert (listed["id"], listed["model"]) == (session, SMALL)
        workers = (await http.get("/v1/workers")).json()["data"]
        assert {each["model"]: each["id"] for each in workers}[two.model] == two.worker
        assert len(workers) == 2
