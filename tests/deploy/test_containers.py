"""The image and docker-compose.yml, built and run for real. `make compose` runs this; `make test` does not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from qaq.v1 import generate_pb2, generate_pb2_grpc

from services.cluster.stack import python_path
from services.common.certificates import files
from services.common.channel import open_channel
from services.common.identity import Identity
from services.common.keys import WithMetadata, authorization

from .engine import ROOT, Engine, EngineError, Project

IMAGE = os.environ.get("COMPOSE_IMAGE", "qaq:cpu")
LARGEST_IMAGE = 2_500_000_000
QAQ_UID = "10001"
ROLES = ("originals", "worker", "router", "gateway")
START_TIMEOUT_S = 600.0
KERNELS = "from qaq_core import kernels; assert kernels.load_library() is not None, kernels.missing_library()"
pytestmark = [pytest.mark.skipif("COMPOSE" not in os.environ, reason="needs `make compose`"), pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    found = Engine.find()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    """Built from this checkout, unless COMPOSE_IMAGE names one that is there."""
    if "COMPOSE_IMAGE" not in os.environ:
        engine.build(IMAGE, "cpu")
    return IMAGE


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the Compose file, what it mounts, and secrets of its own."""
    project = tmp_path_factory.mktemp("compose")
    shutil.copy(ROOT / "docker-compose.yml", project)
    shutil.copytree(ROOT / "deploy", project / "deploy", ignore=shutil.ignore_patterns("secrets"))
    environment = os.environ | {"QAQ": f"{sys.executable} -m services.cli", "PYTHONPATH": python_path()}
    version = os.environ.get("REDIS_VERSION", "8")
    made = [project / "deploy" / "make-secrets", project / "deploy" / "secrets"]
    subprocess.run(made, env=environment | {"REDIS_VERSION": version, "HF_TOKEN": "hf_of_a_test"}, check=True)
    return project / "deploy" / "secrets"


@pytest.fixture(scope="module")
def stack(engine: Engine, image: str, secrets: Path) -> Iterator[Project]:
    """All containers, healthy. Grafana and Prometheus are among them where their images are."""
    ports = {name: str(free_port()) for name in ("ROUTER_PORT", "GATEWAY_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")}
    project = Project(engine, f"qaq-{os.getpid()}", secrets.parents[1], {**ports, "CPU_IMAGE": image})
    try:
        project.compose("up", "--detach", "--no-build", "redis", *ROLES)
        until_healthy(project, "redis", *ROLES)
        yield project
    finally:
        project.compose("--profile", "monitoring", "down", "--volumes", "--timeout", "30")


@pytest.fixture
async def client(stack: Project, secrets: Path) -> AsyncIterator[WithMetadata]:
    address = f"127.0.0.1:{stack.variables['ROUTER_PORT']}"
    key = (secrets / "client.key").read_text().strip()
    async with open_channel(address, Identity(*files(secrets, "client")), "router") as channel:
        yield WithMetadata(generate_pb2_grpc.InferenceStub(channel), authorization(key))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_healthy(project: Project, *services: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    for service in services:
        while not project.healthy(service):
            assert time.monotonic() < deadline, f"{service} is not healthy: {project.log(service)}"
            time.sleep(2)


def kill(project: Project, image: str, process: int) -> None:
    """Kills a process of a container from outside, where also the first one can be killed."""
    script = f"kill -KILL {process}"
    project.engine.run("run", "--rm", "--privileged", "--pid=host", "--user=0", "--entrypoint=sh", image, "-c", script)


def request(new: int = 8, **more: object) -> generate_pb2.GenerateRequest:
    fields: dict = {"sampling": {"temperature": 0}, "stop": {"max_new_tokens": new}, **more}
    return generate_pb2.GenerateRequest(prompt="The capital of France is", **fields)


def gateway(project: Project, secrets: Path, path: str, body: dict | None = None) -> Any:
    """What the gateway answers."""
    key = (secrets / "client.key").read_text().strip()
    asked = urllib.request.Request(
        f"https://127.0.0.1:{project.variables['GATEWAY_PORT']}{path}",
        json.dumps(body).encode() if body else None,
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    context = ssl.create_default_context(cafile=secrets / "client" / "ca.pem")
    with urllib.request.urlopen(asked, context=context, timeout=300) as answer:
        return json.load(answer)


def test_the_image_has_the_kernels(engine: Engine, image: str) -> None:
    engine.run("run", "--rm", "--network=none", "--read-only", "--entrypoint=python", image, "-c", KERNELS)


def test_the_image_is_small(engine: Engine, image: str) -> None:
    assert engine.bytes_of(image) < LARGEST_IMAGE


def test_the_image_has_no_compiler_and_no_root(engine: Engine, image: str) -> None:
    said = engine.run(
        "run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", "id -u; command -v g++ || echo none"
    )
    assert said.split() == [QAQ_UID, "none"]


async def test_a_generation(client: generate_pb2_grpc.InferenceStub) -> None:
    replies = [reply async for reply in client.Generate(request())]
    assert "Paris" in "".join(reply.token.text for reply in replies) + replies[-1].finished.text
    assert replies[-1].finished.usage.cache.kv_bytes > 0


def test_a_chat(stack: Project, secrets: Path) -> None:
    model = gateway(stack, secrets, "/v1/models")["data"][0]["id"]
    messages = [{"role": "user", "content": "Name a colour."}]
    body = {"model": model, "messages": messages, "max_tokens": 8}
    answer = gateway(stack, secrets, "/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"].strip()


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_not_root_and_cannot_write_its_image(stack: Project, role: str) -> None:
    assert stack.exec(role, "id", "-u").strip() == QAQ_UID
    with pytest.raises(EngineError, match="Read-only file system"):
        stack.exec(role, "touch", "/opt/qaq/file")
    stack.exec(role, "touch", "/tmp/file")


@pytest.mark.parametrize("role", ["router", "worker"])
def test_the_volume_of_models_is_the_users(stack: Project, role: str) -> None:
    stack.exec(role, "touch", f"/home/qaq/.cache/{role}")
    assert stack.exec(role, "stat", "--format=%u", "/home/qaq/.cache").strip() == QAQ_UID


@pytest.mark.parametrize("role", ["router", "worker"])
def test_the_hub_is_asked_with_the_token_of_the_secret(stack: Project, role: str) -> None:
    code = "from huggingface_hub import get_token; print(get_token())"
    assert stack.exec(role, "python", "-c", code).strip() == "hf_of_a_test"
    assert "hf_of_a_test" not in json.dumps(stack.inspect(role))


def test_redis_is_not_root_and_its_data_outlives_it(stack: Project) -> None:
    assert stack.exec("redis", "id", "-u").strip() == "999"
    stack.engine.run("restart", stack.container("redis"))
    until_healthy(stack, "redis")
    assert "appendonlydir" in stack.exec("redis", "ls", "/data")


async def test_a_stream_outlives_its_worker(
    stack: Project, image: str, client: generate_pb2_grpc.InferenceStub
) -> None:
    """The worker's process is killed; the engine starts the container again, and the stream goes on there."""
    before = stack.inspect("worker")["State"]["Pid"]
    tokens = []
    async for reply in client.Generate(request(64, stop={"max_new_tokens": 64, "ignore_eos": True})):
        if reply.WhichOneof("event") == "token":
            tokens.append(reply.token.index)
            if len(tokens) == 4:
                kill(stack, image, before)
    assert tokens == list(range(64))
    until_healthy(stack, "worker")
    assert stack.inspect("worker")["State"]["Pid"] != before


def test_prometheus_finds_every_role(stack: Project) -> None:
    try:
        stack.compose("--profile", "monitoring", "up", "--detach", "--no-build", "--no-deps", "prometheus")
    except EngineError as error:
        pytest.skip(f"no image of Prometheus here: {str(error)[-300:]}")
    until_healthy(stack, "prometheus")
    address = f"http://127.0.0.1:{stack.variables['PROMETHEUS_PORT']}/api/v1/targets"
    deadline = time.monotonic() + 60
    found: dict[str, str] = {}
    while set(found.values()) != {"up"} or set(found) != set(ROLES):
        assert time.monotonic() < deadline, found
        time.sleep(2)
        with urllib.request.urlopen(address) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
        found = {target["labels"]["job"]: target["health"] for target in targets}
