"""A whole stack in this process, over a tiny model, and what must hold of it after whatever it was sent."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import structlog
import torch
from qaq.v1 import common_pb2, generate_pb2, generate_pb2_grpc, worker_pb2, worker_pb2_grpc
from redis.asyncio import Redis
from transformers import LlamaConfig, LlamaForCausalLM

from qaq_core.models import LoadedModel, load_tokenizer
from services.common import interceptor, memory
from services.common.admission import Admission
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import StatusError, to_status
from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings
from services.gateway.bodies import Bodies
from services.gateway.server import GatewayServer
from services.originals.server import OriginalsServer
from services.originals.uploads import Uploads
from services.router.server import RouterServer
from services.worker.server import WorkerServer

CONTEXT = 384
GROWTH = 100 << 20
"""Bytes that a stack and its clients may hold more after all messages than after a quarter as many others, which warm
it up: what it makes once is made by then."""

LONG = int(os.environ.get("QAQ_FUZZ", "0"))
"""How much longer form is asked for: about how many messages. QAQ_FUZZ=10000 pytest tests/fuzz"""

SEED = int(os.environ.get("QAQ_FUZZ_SEED", "1"))
"""Other messages with another one."""

SETTLE_S = 20.0


@dataclass
class Fuzzed:
    """A stack.

    Attributes:
        addresses: of each kind of server.
        errors: unexpected errors that its servers have logged, and internal ones that they have answered with.
    """

    addresses: dict[str, str]
    redis: Redis
    errors: list[Any]

    async def check(self) -> None:
        """Everything is given back, and a request is answered."""
        await self._until_settled()
        assert not self.errors, self.errors[0]
        asked = generate_pb2.GenerateRequest(
            prompt="Hello",
            choices=8,  # all places
            stop=common_pb2.StopParams(max_new_tokens=2, ignore_eos=True),
        )
        async with grpc.aio.insecure_channel(self.addresses["router"]) as channel:
            stub, ends = generate_pb2_grpc.InferenceStub(channel), asyncio.get_running_loop().time() + SETTLE_S
            while not (await stub.GetModel(generate_pb2.GetModelRequest(), timeout=30)).workers:
                # A machine that is busy may have held up this process, heartbeats included.
                assert asyncio.get_running_loop().time() < ends
                await asyncio.sleep(0.1)
            call = stub.Generate(asked, timeout=60)
            assert [reply.WhichOneof("event") async for reply in call].count("finished") == 8
        await self._until_settled()

    async def held(self) -> dict[str, int]:
        """What is counted and not given back."""
        async with grpc.aio.insecure_channel(self.addresses["worker"]) as channel:
            described = await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=30)
        counts = {"running": described.running, "waiting": described.waiting}
        for made in all_of(Admission):
            counts["places"] = counts.get("places", 0) + made.taken + made.waiting
        for made in all_of(Uploads):
            counts["uploads"] = counts.get("uploads", 0) + made.count + made.held
        for made in all_of(Bodies):
            counts["bodies"] = counts.get("bodies", 0) + made.held
        counts["holds"] = len([key async for key in self.redis.scan_iter("qaq:session:*:hold")])
        return {name: count for name, count in counts.items() if count}

    async def _until_settled(self) -> None:
        ends = asyncio.get_running_loop().time() + SETTLE_S
        while held := await self.held():
            assert asyncio.get_running_loop().time() < ends, f"not given back: {held}"
            await asyncio.sleep(0.1)


def all_of(kind: type) -> list[Any]:
    """Every object of a kind in this process."""
    return [made for made in gc.get_objects() if isinstance(made, kind)]


async def resident() -> int:
    """Bytes of this process, once it has given back what is free: the least of some seconds."""
    least = sys.maxsize
    for _ in range(12):
        gc.collect()
        least = min(least, int(psutil.Process().memory_info().rss))
        await asyncio.sleep(memory.LOOK_S)
    return least


def _tiny(path: Path) -> LoadedModel:
    """The demo model's tokenizer with a model that takes a millisecond a token."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(path))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    return LoadedModel(model, tokenizer, "tiny", str(path), "f" * 64, torch.float32, CONTEXT)


def _noted(errors: list[Any]) -> Any:
    """`to_status` of the servers, which notes what must not be."""

    def told(error: Exception) -> StatusError | None:
        status = to_status(error)
        if status is not None and status.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            errors.append(f"{status.code.name}: {status.message}")
        return status

    return told


def _unexpected(errors: list[Any]) -> Any:
    def note(logger: Any, method: str, entry: dict[str, Any]) -> dict[str, Any]:
        if entry.get("event") in ("unexpected error", "a stream failed", "a step failed") or method == "critical":
            errors.append(structlog.processors.format_exc_info(logger, method, dict(entry)))
        raise structlog.DropEvent

    return note


@pytest.fixture
async def fuzzed(
    redis: Redis, redis_server: EmbeddedRedis, model_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Fuzzed]:
    monkeypatch.setenv("QAQ_CACHE_DIR", os.environ.get("QAQ_CACHE_DIR", str(tmp_path)))
    monkeypatch.setattr(memory, "LOOK_S", 0.25)
    errors: list[Any] = []
    monkeypatch.setattr(interceptor, "to_status", _noted(errors))
    before = structlog.get_config()["processors"]
    structlog.configure(processors=[_unexpected(errors)])
    common: dict[str, Any] = {"redis_url": redis_server.url, "port": 0}
    loaded = await asyncio.to_thread(_tiny, model_path)
    servers: dict[str, Any] = {
        "originals": OriginalsServer(OriginalsSettings(**common)),
        "worker": WorkerServer(WorkerSettings(model="tiny", preset="fp16", prefix_timeout_s=2, **common), loaded),
        "router": RouterServer(RouterSettings(model=str(model_path), smg=_has_smg(), **common)),
        "gateway": GatewayServer(GatewaySettings(**common)),
    }
    try:
        async with contextlib.AsyncExitStack() as stack:
            addresses = {}
            for name, server in servers.items():
                addresses[name] = await server.start()
                stack.push_async_callback(server.stop)
            yield Fuzzed(addresses, redis, errors)
    finally:
        structlog.configure(processors=before)


def _has_smg() -> bool:
    try:
        import smg_grpc_proto  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
