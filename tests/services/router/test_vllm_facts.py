"""What vLLM's engine protocol says of a router: its model, load, tokenizer, and what it does not serve."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2 as smg
from transformers import AutoTokenizer

from qaq_core.base.errors import ConfigError
from qaq_core.models import load_tokenizer
from services.common.settings import RouterSettings
from services.router.server import RouterServer
from services.router.vllm_engine import PIECE_BYTES, SERVICE_NAME

from .conftest import CONTEXT, CountingWorker, router_channel
from .vllm import Stub, refusal

Code = grpc.StatusCode


async def test_model(engine: Stub, model_path: Path) -> None:
    info = await engine.GetModelInfo(vllm.GetModelInfoRequest())
    tokenizer = load_tokenizer(str(model_path))
    assert (info.served_model_name, info.tokenizer_path) == ("counting", str(model_path))
    assert (info.max_context_length, info.max_req_input_len, info.vocab_size) == (CONTEXT, CONTEXT - 1, 49152)
    assert (info.bos_token_id, info.pad_token_id) == (tokenizer.bos_token_id or 0, tokenizer.pad_token_id or 0)
    assert info.is_generation


async def test_server_and_load(engine: Stub, worker: CountingWorker) -> None:
    server = await engine.GetServerInfo(vllm.GetServerInfoRequest())
    assert (server.server_type, server.data_parallel_size, server.max_num_seqs) == ("vllm-grpc", 1, 8)
    loads = await engine.GetLoads(vllm.GetLoadsRequest(dp_rank=0, include=["core"]))
    (load,) = loads.loads
    assert (load.max_running_requests, load.num_total_reqs, loads.dp_rank_count) == (8, 0, 1)
    error = await refusal(engine.GetLoads(vllm.GetLoadsRequest(dp_rank=1)))
    assert (error.code(), error.details()) == (
        Code.INVALID_ARGUMENT,
        "dp_rank is 1, and this engine has one rank; send 0",
    )


async def test_health(engine: Stub, channel: grpc.aio.Channel) -> None:
    assert (await engine.HealthCheck(vllm.HealthCheckRequest())).healthy
    served = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert served.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_without_workers(redis: Redis, smg_settings: RouterSettings) -> None:
    async with router_channel(smg_settings) as channel:
        health = await Stub(channel).HealthCheck(vllm.HealthCheckRequest())
        assert (health.healthy, health.message) == (False, "ready workers: 0")
        (load,) = (await Stub(channel).GetLoads(vllm.GetLoadsRequest())).loads
        assert (load.max_running_requests, load.token_usage) == (0, 0)
        assert (await refusal(Stub(channel).GetModelInfo(vllm.GetModelInfoRequest()))).code() is Code.UNAVAILABLE


async def test_the_tokenizer_travels_as_files(engine: Stub, model_path: Path, tmp_path: Path) -> None:
    chunks = [chunk async for chunk in engine.GetTokenizer(smg.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert len(chunks) > 1
    assert all(len(chunk.data) == PIECE_BYTES and not chunk.sha256 for chunk in chunks[:-1])
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {"tokenizer.json", "tokenizer_config.json"} <= set(archive.namelist())
        archive.extractall(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(model_path))
    messages = [{"role": "user", "content": "Grüße, and <|im_end|>"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False)
    assert theirs("Once upon a time")["input_ids"] == ours("Once upon a time")["input_ids"]


@pytest.mark.parametrize(
    ("method", "message", "says"),
    [
        ("SubscribeKvEvents", smg.SubscribeKvEventsRequest(), "events"),
        ("Embed", vllm.EmbedRequest(), "embeddings"),
        ("FlushCache", smg.FlushCacheRequest(), "flushed"),
        ("StartProfile", smg.StartProfileRequest(), "profiler"),
        ("StopProfile", smg.StopProfileRequest(), "profiler"),
    ],
)
async def test_what_is_not_served_says_so(engine: Stub, method: str, message: Any, says: str) -> None:
    call = getattr(engine, method)(message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if method == "SubscribeKvEvents" else call)
    assert caught.value.code() is Code.UNIMPLEMENTED
    assert says in caught.value.details()


# -- whether it is served at all ------------------------------------------------------------------------


async def test_off_unless_the_setting_says_so(redis: Redis, router_settings: RouterSettings) -> None:
    async with router_channel(router_settings) as channel:
        error = await refusal(Stub(channel).HealthCheck(vllm.HealthCheckRequest()))
        assert error.code() is Code.UNIMPLEMENTED


async def test_a_missing_extra_is_one_sentence(
    redis: Redis, smg_settings: RouterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "smg_grpc_proto", None)
    with pytest.raises(ConfigError, match=r"pip install 'qaq-kv\[smg\]'"):
        await RouterServer(smg_settings).start()
