"""What tests ask of vLLM's engine protocol."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

Stub = vllm_engine_pb2_grpc.VllmEngineStub
PROMPT = [100, 200, 300]


def request(ids: list[int] = PROMPT, *, stream: bool = True, name: str = "one", **params: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id=name,
        tokenized=vllm.TokenizedInput(input_ids=ids),
        sampling_params=vllm.SamplingParams(**{"max_tokens": 3, **params}),
        stream=stream,
    )


async def responses(call: Any) -> list[Any]:
    """What each response holds: chunks and completions."""
    return [getattr(response, response.WhichOneof("response")) async for response in call]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (responses(call) if hasattr(call, "__aiter__") else call)
    return caught.value
