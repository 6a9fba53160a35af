"""`qaq top` against the servers of docker-compose.yml."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import jsonschema
from qaq.v1 import common_pb2, generate_pb2

from services.common.keys import WithMetadata

from .command import ROOT, here
from .composed import Composed

SCHEMA = json.loads((ROOT / "services" / "schemas" / "top.json").read_text())


async def test_a_session_is_seen_with_its_worker(composed: Composed, client: WithMetadata, tmp_path: Path) -> None:
    opened = await client.OpenSession(generate_pb2.OpenSessionRequest())
    request = generate_pb2.GenerateRequest(
        prompt="The capital of France is " * 30,
        session_id=opened.session_id,
        stop=common_pb2.StopParams(max_new_tokens=4),
        sampling=common_pb2.SamplingParams(temperature=0),
    )
    async for _ in client.Generate(request):
        pass
    path = tmp_path / "top.json"
    secrets = composed.secrets / "operator"
    done = await asyncio.to_thread(
        here,
        "top",
        "--once",
        "--interval",
        "0.2",
        "--router",
        composed.addresses["router"],
        "--json",
        path,
        COLUMNS="160",
        QAQ_API_KEY=composed.key,
        QAQ_TLS_CA=str(secrets / "ca.pem"),
        QAQ_TLS_CERT=str(secrets / "cert.pem"),
        QAQ_TLS_KEY=str(secrets / "key.pem"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    jsonschema.validate(found, SCHEMA)
    (session,) = [each for each in found["sessions"] if each["id"] == opened.session_id]
    assert (session["running"], session["tokens"] > 100) == (False, True)
    (worker,) = [each for each in found["workers"] if each["address"] == session["worker"]]
    assert worker["state"] == "running"
    assert worker["sessions"] >= 1
    assert worker["kv_bytes_fp16"] > worker["kv_bytes"] > 0
    assert worker["bits"] > 0
    assert found["all_tenants"] is False  # a client's key
    assert session["worker"] in done.stdout
    await client.CloseSession(generate_pb2.CloseSessionRequest(session_id=opened.session_id))
