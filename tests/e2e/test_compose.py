from __future__ import annotations

import subprocess
import sys

from qaq.v1 import generate_pb2, generate_pb2_grpc

from .composed import ROOT, Composed


def test_the_file_is_valid_by_the_compose_specification() -> None:
    """check-jsonschema brings the specification's own schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, ROOT / "docker-compose.yml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_no_command_and_no_environment_holds_a_secret() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert "requirepass" not in text
    assert "redis://" not in text


async def test_its_commands_answer_a_request(composed: Composed, client: generate_pb2_grpc.InferenceStub) -> None:
    assert set(composed.addresses) == {"originals", "worker", "router", "gateway"}
    request = generate_pb2.GenerateRequest(
        prompt="The capital of France is", sampling={"temperature": 0}, stop={"max_new_tokens": 8}
    )
    replies = [reply async for reply in client.Generate(request)]
    text = "".join(reply.token.text for reply in replies) + replies[-1].finished.text
    assert "Paris" in text
    assert replies[-1].finished.usage.cache.kv_bytes > 0
