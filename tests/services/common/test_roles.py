"""Who may call what, over real handshakes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from qaq.v1 import (
    generate_pb2,
    generate_pb2_grpc,
    inspect_pb2,
    inspect_pb2_grpc,
    originals_pb2,
    originals_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

from services.common.certificates import files, issue
from services.common.channel import open_channel
from services.common.identity import Identity
from services.common.roles import RIGHTS, ROLES, may_call, role_of, uri
from services.common.server import GrpcServer

FILES = (generate_pb2, inspect_pb2, worker_pb2, originals_pb2)
METHODS = {
    f"{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
CLIENTS = {"client", "gateway", "operator"}
ADDERS = (
    generate_pb2_grpc.add_InferenceServicer_to_server,
    inspect_pb2_grpc.add_InspectorServicer_to_server,
    worker_pb2_grpc.add_WorkerServicer_to_server,
    originals_pb2_grpc.add_OriginalsServicer_to_server,
)
SERVICERS = (
    generate_pb2_grpc.InferenceServicer,
    inspect_pb2_grpc.InspectorServicer,
    worker_pb2_grpc.WorkerServicer,
    originals_pb2_grpc.OriginalsServicer,
)


def allowed(method: str) -> set[str]:
    """The table once more, in other words."""
    if method.startswith(("qaq.v1.Inference/", "qaq.v1.Inspector/")):
        return CLIENTS
    special = {
        "qaq.v1.Worker/Drain": {"operator"},
        "qaq.v1.Worker/Describe": {"router", "operator"},
        "qaq.v1.Originals/Stats": {"worker", "operator"},
    }
    return special.get(method) or ({"router"} if "Worker" in method else {"worker"})


def test_the_table_names_what_there_is() -> None:
    services = {method.partition("/")[0] for method in METHODS} | {"vllm.grpc.engine.VllmEngine"}
    assert {name.partition("/")[0] for name in RIGHTS} == services
    assert {name for name in RIGHTS if "/" in name} <= METHODS.keys()
    assert not may_call("operator", "qaq.v1.New/Method")
    assert not may_call(None, "qaq.v1.Inference/Generate")


def test_a_certificate_has_one_role() -> None:
    assert role_of(["worker.qaq.internal", uri("worker")]) == "worker"
    assert role_of(["router", "localhost"]) is None
    assert role_of([uri("worker"), uri("router")]) is None
    assert role_of(["qaq://role/king"]) is None


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[str]:
    """Every service at one address; all methods fail, if the caller may call them."""
    issue(tmp_path)
    server = GrpcServer(identity=Identity(*files(tmp_path, "worker")))
    for file, add, servicer in zip(FILES, ADDERS, SERVICERS, strict=True):
        (name,) = (service.full_name for service in file.DESCRIPTOR.services_by_name.values())
        server.add(name, add, servicer())
    yield await server.start()
    await server.stop(0)


async def code_of(channel: grpc.aio.Channel, method: str) -> tuple[grpc.StatusCode, str]:
    described = METHODS[method]
    kind = "_".join("stream" if yes else "unary" for yes in (described.client_streaming, described.server_streaming))
    asked = iter([b""]) if described.client_streaming else b""
    call = getattr(channel, kind)(f"/{method}")(asked, timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if described.server_streaming else call)
    return caught.value.code(), caught.value.details() or ""


async def test_each_role_reaches_its_own_methods_alone(server: str, tmp_path: Path) -> None:
    for role in ROLES:
        async with open_channel(server, Identity(*files(tmp_path, role)), "worker") as channel:
            for method in METHODS:
                code, sentence = await code_of(channel, method)
                refused = code is grpc.StatusCode.PERMISSION_DENIED
                assert refused is (role not in allowed(method)), (role, method, code)
                if refused:
                    assert f"of the role {role} may not call {method}" in sentence


async def test_a_worker_cannot_list_sessions(server: str, tmp_path: Path) -> None:
    async with open_channel(server, Identity(*files(tmp_path, "worker"))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate_pb2_grpc.InferenceStub(channel).ListSessions(generate_pb2.ListSessionsRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
