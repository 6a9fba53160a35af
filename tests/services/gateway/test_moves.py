"""A constrained answer that moves to another worker in the middle, through a real stack."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import grpc
import jsonschema
from qaq.v1 import generate_pb2, generate_pb2_grpc
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common.embedded_redis import EmbeddedRedis
from services.common.settings import OriginalsSettings, RouterSettings, WorkerSettings
from services.originals.server import OriginalsServer
from services.router.server import RouterServer
from services.worker.server import WorkerServer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 8, "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


async def test_the_rest_of_the_text_fits_what_was_sent(
    redis: Redis, redis_server: EmbeddedRedis, smollm2: LoadedModel, model_path: Path
) -> None:
    common = {"redis_url": redis_server.url, "port": 0}
    workers = [WorkerServer(WorkerSettings(model="smollm2", preset="fp16", **common), smollm2) for _ in range(2)]
    router = RouterServer(RouterSettings(model=str(model_path), **common))
    async with contextlib.AsyncExitStack() as stack:
        for server in (OriginalsServer(OriginalsSettings(**common)), *workers, router):
            address = await server.start()
            stack.push_async_callback(server.stop)
        stub = generate_pb2_grpc.InferenceStub(await stack.enter_async_context(grpc.aio.insecure_channel(address)))
        asked = generate_pb2.GenerateRequest(prompt="A person: ", sampling={"temperature": 1, "seed": 4})
        asked.stop.max_new_tokens = 120
        asked.constraint.json_schema = json.dumps(SCHEMA)
        text, tokens, moved = "", [], False
        async for reply in stub.Generate(asked):
            if reply.HasField("token"):
                tokens.append(reply.token.index)
                text += reply.token.text
            if reply.HasField("finished"):
                text += reply.finished.text
            if len(tokens) == 3 and not moved:
                (running,) = [each for each in workers if each.scheduler and each.scheduler.state.running]
                moved = await running.drain() == 1
    assert moved
    assert tokens == list(range(len(tokens)))
    jsonschema.validate(json.loads(text), SCHEMA)
