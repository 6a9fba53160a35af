from __future__ import annotations

from qaq.v1 import generate_pb2, generate_pb2_grpc

from .composed import Composed


async def test_its_commands_answer_a_request(composed: Composed, client: generate_pb2_grpc.InferenceStub) -> None:
    assert set(composed.addresses) == {"originals", "worker", "router", "gateway"}
    request = generate_pb2.GenerateRequest(
        prompt="The capital of France is", sampling={"temperature": 0}, stop={"max_new_tokens": 8}
    )
    replies = [reply async for reply in client.Generate(request)]
    text = "".join(reply.token.text for reply in replies) + replies[-1].finished.text
    assert "Paris" in text
    assert replies[-1].finished.usage.cache.kv_bytes > 0
