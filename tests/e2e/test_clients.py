"""Clients that know nothing of QAQ: OpenAI's own, and one that learns the API by reflection."""

from __future__ import annotations

import ssl

import grpc
import httpx2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from openai import OpenAI

from .composed import Composed


def test_openais_client(composed: Composed) -> None:
    url = f"https://{composed.addresses['gateway']}/v1"
    trusted = httpx2.Client(verify=ssl.create_default_context(cafile=composed.secrets / "ca.pem"))
    with OpenAI(base_url=url, api_key=composed.key, max_retries=0, timeout=120, http_client=trusted) as client:
        (model,) = client.models.list().data
        said = client.completions.create(model=model.id, prompt="The capital of France is", max_tokens=8, temperature=0)
        assert "Paris" in said.choices[0].text
        parts = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": "Name the capital of France."}],
            max_tokens=20,
            temperature=0,
            stream=True,
        )
        assert "Paris" in "".join(part.choices[0].delta.content or "" for part in parts)


def test_reflection(composed: Composed) -> None:
    """As grpcurl does it: the services, then a method's messages, then a call from JSON to JSON."""
    ca = (composed.secrets / "ca.pem").read_bytes()
    with grpc.secure_channel(composed.addresses["router"], grpc.ssl_channel_credentials(ca)) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"qaq.v1.Inference", "grpc.health.v1.Health"} <= set(database.get_services())
        method = DescriptorPool(database).FindServiceByName("qaq.v1.Inference").FindMethodByName("Generate")
        assert method.server_streaming
        request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = channel.unary_stream(
            "/qaq.v1.Inference/Generate",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )
        asked = {
            "prompt": "The capital of France is",
            "sampling": {"temperature": 0},
            "stop": {"maxNewTokens": 8},
            "output": {"logprobs": True},
        }
        key = [("authorization", f"Bearer {composed.key}")]
        calls = call(ParseDict(asked, request()), timeout=60, metadata=key)
        got = [MessageToDict(message) for message in calls]
    assert "Paris" in "".join(message.get("token", {}).get("text", "") for message in got)
    assert got[-1]["finished"]["reason"] == "FINISH_REASON_LENGTH"
    assert all(message["token"]["info"]["logprob"] <= 0 for message in got if "token" in message)
