"""Who may call a router: every method with no key, a wrong one, a tenant's and an operator's."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from prometheus_client import REGISTRY
from qaq.v1 import generate_pb2, generate_pb2_grpc
from redis.asyncio import Redis

from qaq_core.base.errors import ConfigError
from services.common.keys import authorization
from services.common.settings import RouterSettings
from services.common.tenants import add_key
from services.router import callers as module
from services.router.callers import Callers
from services.router.server import RouterServer
from tests.services.tenancy import Tenancy

from .conftest import CountingWorker, router_channel
from .test_service import replies, request

Code = grpc.StatusCode
INFERENCE = generate_pb2.DESCRIPTOR.services_by_name["Inference"]

REQUESTS: dict[str, dict[str, Any]] = {
    "Generate": {"prompt": "Hi", "stop": {"max_new_tokens": 1}},
    "Chat": {"messages": [{"role": "user", "content": "Hi"}], "stop": {"max_new_tokens": 1}},
    "Rejoin": {},
    "Tokenize": {"text": "Hi"},
    "Detokenize": {"token_ids": [1]},
    "GetModel": {},
    "ListModels": {},
    "OpenSession": {},
    "CloseSession": {},
    "ListSessions": {},
}
"""A request of each method that a tenant may send; those that need a session lack it."""


@pytest.fixture
def tenancy(tmp_path: Path) -> Tenancy:
    return Tenancy(tmp_path / "tenants.json")


@pytest.fixture
async def channel(
    worker: CountingWorker, router_settings: RouterSettings, tenancy: Tenancy
) -> AsyncIterator[grpc.aio.Channel]:
    """To a router with the tenants."""
    async with router_channel(router_settings.model_copy(update={"tenants_file": tenancy.path})) as channel:
        yield channel


async def answers(channel: grpc.aio.Channel, method: Any, metadata: Any, **fields: Any) -> list[Any]:
    """Calls a method by its descriptor, as it is."""
    message, reply = (getattr(generate_pb2, each.name) for each in (method.input_type, method.output_type))
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = kind(
        f"/{INFERENCE.full_name}/{method.name}",
        request_serializer=message.SerializeToString,
        response_deserializer=reply.FromString,
    )(message(**REQUESTS[method.name] | fields), metadata=metadata, timeout=20)
    return [each async for each in call] if method.server_streaming else [await call]


async def refusal(channel: grpc.aio.Channel, method: Any, metadata: Any, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answers(channel, method, metadata, **fields)
    return caught.value


NOT_KEYS = {
    "no key": (),
    "a wrong key": authorization("qaq_" + "x" * 43),
    "an empty key": (("authorization", "Bearer "),),
    "no bearer": (("authorization", "Basic YTpi"),),
    "a very long key": authorization("x" * 4000),
    "a tenant's name alone": (("qaq-tenant", "ada"),),
}


async def test_every_method_needs_a_key(channel: grpc.aio.Channel, tenancy: Tenancy) -> None:
    for method in INFERENCE.methods:
        before = REGISTRY.get_sample_value("qaq_unauthenticated_total") or 0
        for metadata in NOT_KEYS.values():
            error = await refusal(channel, method, metadata)
            assert error.code() is Code.UNAUTHENTICATED
            assert "key" in error.details()
            assert dict(error.trailing_metadata())["qaq-reason"] == "invalid_api_key"
            assert "xxxx" not in error.details()
        assert REGISTRY.get_sample_value("qaq_unauthenticated_total") == before + len(NOT_KEYS)
        for name in ("ada", "root"):
            for key in (authorization(tenancy.keys[name]), (("authorization", f"bearer {tenancy.keys[name]}"),)):
                if method.name in ("Rejoin", "CloseSession"):  # without a session
                    assert (await refusal(channel, method, key)).code() is Code.INVALID_ARGUMENT
                else:
                    assert await answers(channel, method, key)


async def test_a_request_of_nobody_is_not_read(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary(f"/{INFERENCE.full_name}/Tokenize")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\xff\xff\xff", timeout=10)
    assert caught.value.code() is Code.UNAUTHENTICATED


SESSIONS = {"session_id", "branch_of"}


async def test_another_tenants_session_does_not_exist(
    channel: grpc.aio.Channel, tenancy: Tenancy, redis: Redis
) -> None:
    """In the words for an id that nobody has; also while it generates, when its own tenant would be told that."""
    named = [(method, field) for method in INFERENCE.methods for field in method.input_type.fields_by_name]
    of_sessions = [(method, field) for method, field in named if field in SESSIONS]
    assert len(of_sessions) >= 5
    ada = tenancy.stub(channel, "ada")
    session = (await ada.OpenSession(generate_pb2.OpenSessionRequest())).session_id
    await replies(ada.Generate(request(session_id=session)))
    before = [await redis.dump(f"qaq:session:{session}{part}") for part in ("", ":tokens", ":run")]
    for method, field in of_sessions:
        others = ["bob"] if method.name == "CloseSession" else ["bob", "root"]
        for name in others:
            key = authorization(tenancy.keys[name])
            for running in (False, True):
                if running:
                    await redis.set(f"qaq:session:{session}:run", "9", ex=60)
                error, unknown = [await refusal(channel, method, key, **{field: each}) for each in (session, "nobody")]
                assert error.code() is unknown.code() is Code.NOT_FOUND
                assert error.details() == unknown.details().replace("nobody", session)
                if running:
                    await redis.delete(f"qaq:session:{session}:run")
    assert [await redis.dump(f"qaq:session:{session}{part}") for part in ("", ":tokens", ":run")] == before
    assert await replies(ada.Generate(request(" more", session_id=session)))


async def test_a_session_for_one_call_is_its_tenants_too(
    channel: grpc.aio.Channel, tenancy: Tenancy, worker: CountingWorker
) -> None:
    worker.gate.clear()
    ada, bob = tenancy.stub(channel, "ada"), tenancy.stub(channel, "bob")
    call = aiter(ada.Generate(request()))
    session = (await anext(call)).session_id
    asked = generate_pb2.RejoinRequest(session_id=session)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replies(bob.Rejoin(asked))
    assert caught.value.code() is Code.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bob.CloseSession(generate_pb2.CloseSessionRequest(session_id=session))
    assert caught.value.code() is Code.NOT_FOUND
    worker.gate.set()
    assert [each async for each in call][-1].HasField("finished")


async def test_a_list_has_the_callers_sessions_and_an_operators_has_all(
    channel: grpc.aio.Channel, tenancy: Tenancy, worker: CountingWorker
) -> None:
    stubs = {name: tenancy.stub(channel, name) for name in ("ada", "bob", "root")}
    opened = {
        name: (await stubs[name].OpenSession(generate_pb2.OpenSessionRequest())).session_id for name in ("ada", "bob")
    }

    async def listed(name: str, **fields: bool) -> dict[str, str]:
        reply = await stubs[name].ListSessions(generate_pb2.ListSessionsRequest(**fields))
        return {each.tenant: each.session_id for each in reply.sessions}

    assert await listed("ada") == {"ada": opened["ada"]}
    assert await listed("root") == {}
    assert await listed("root", all_tenants=True) == opened
    with pytest.raises(grpc.aio.AioRpcError, match="needs the key of an operator") as caught:
        await listed("bob", all_tenants=True)
    assert caught.value.code() is Code.PERMISSION_DENIED
    await replies(stubs["ada"].Generate(request(session_id=opened["ada"])))
    await stubs["root"].CloseSession(generate_pb2.CloseSessionRequest(session_id=opened["ada"]))
    assert worker.dropped == [opened["ada"]]
    assert await listed("ada") == {}


async def test_the_tenant_is_that_of_the_key(
    channel: grpc.aio.Channel, tenancy: Tenancy, worker: CountingWorker
) -> None:
    stub = generate_pb2_grpc.InferenceStub(channel)
    key = authorization(tenancy.keys["ada"])
    await replies(stub.Generate(request(), metadata=(*key, ("qaq-tenant", "ada"))))
    assert worker.asked[0].tenant == "ada"
    with pytest.raises(grpc.aio.AioRpcError, match="is not the tenant of this key") as caught:
        await replies(stub.Generate(request(), metadata=(*key, ("qaq-tenant", "bob"))))
    assert caught.value.code() is Code.INVALID_ARGUMENT


async def test_without_a_file_tenants_name_themselves(
    client: generate_pb2_grpc.InferenceStub, worker: CountingWorker
) -> None:
    """A key means nothing then, and no tenant is an operator; sessions are still of the tenant that opened them."""
    ada, bob = (("qaq-tenant", "ada"), *authorization("none")), (("qaq-tenant", "bob"),)
    session = (await client.OpenSession(generate_pb2.OpenSessionRequest(), metadata=ada)).session_id
    await replies(client.Generate(request(session_id=session), metadata=ada))
    assert worker.asked[0].tenant == "ada"
    for metadata in (bob, ()):
        with pytest.raises(grpc.aio.AioRpcError, match="does not exist") as caught:
            await replies(client.Generate(request(session_id=session), metadata=metadata))
        assert caught.value.code() is Code.NOT_FOUND
        assert not (await client.ListSessions(generate_pb2.ListSessionsRequest(), metadata=metadata)).sessions
    with pytest.raises(grpc.aio.AioRpcError, match="needs the key of an operator"):
        await client.ListSessions(generate_pb2.ListSessionsRequest(all_tenants=True))


async def test_a_changed_file_holds_at_once_and_streams_go_on(
    channel: grpc.aio.Channel, tenancy: Tenancy, worker: CountingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_S", 0.0)
    worker.gate.clear()
    ada = tenancy.stub(channel, "ada")
    running = aiter(ada.Generate(request()))
    await anext(running)
    tenancy.keys["new"] = add_key(tenancy.path, "new")
    add_key(tenancy.path, "ada", replace=True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ada.GetModel(generate_pb2.GetModelRequest())
    assert caught.value.code() is Code.UNAUTHENTICATED
    assert (await tenancy.stub(channel, "new").GetModel(generate_pb2.GetModelRequest())).model.name == "counting"
    worker.gate.set()
    assert [each async for each in running][-1].HasField("finished")


async def test_a_bad_file_changes_nothing_and_is_logged_once(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_S", 0.0)
    known, ada = Callers(tenancy.path), authorization(tenancy.keys["ada"])
    before = REGISTRY.get_sample_value("qaq_tenants_failures_total") or 0
    good = tenancy.path.read_text()
    with structlog.testing.capture_logs() as logs:
        for content in (f'{{"tenants": "{tenancy.keys["bob"]}"}}', None):
            tenancy.path.unlink()
            if content is not None:
                tenancy.path.write_text(content)
            for _ in range(3):
                assert known.known(ada).tenant == "ada"
    assert [each["log_level"] for each in logs] == ["error", "error"]
    assert tenancy.keys["bob"] not in str(logs)
    assert REGISTRY.get_sample_value("qaq_tenants_failures_total") == before + 2
    tenancy.path.write_text(good)
    assert known.known(ada).tenant == "ada"


async def test_the_file_is_looked_at_once_a_second(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    known, ada = Callers(tenancy.path), authorization(tenancy.keys["ada"])
    looks: list[object] = []
    monkeypatch.setattr(module, "_version", looks.append)
    now = time.monotonic() + 100
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    for _ in range(5):
        known.known(ada)
    assert len(looks) == 1


async def test_a_router_does_not_start_with_a_bad_file(router_settings: RouterSettings, tmp_path: Path) -> None:
    path = tmp_path / "tenants.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid"):
        await RouterServer(router_settings.model_copy(update={"tenants_file": path})).start()


async def test_no_key_is_logged_or_written_to_redis(
    channel: grpc.aio.Channel, tenancy: Tenancy, redis: Redis, capfd: pytest.CaptureFixture[str]
) -> None:
    tenancy.limit("ada", requests_per_minute=100, concurrent_streams=2)
    with structlog.testing.capture_logs() as logs:
        for name in ("ada", "nobody"):
            for method in INFERENCE.methods:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await answers(channel, method, authorization(tenancy.keys[name]))
        written = [await redis.dump(key) async for key in redis.scan_iter("*")]
        named = [key async for key in redis.scan_iter("*")]
    seen = str(logs) + "".join(capfd.readouterr()) + str(dict(os.environ))
    for name, key in tenancy.keys.items():
        assert key not in seen, name
        assert not any(key.encode() in (value or b"") for value in [*written, *named])


async def test_a_router_that_others_reach_says_that_it_knows_nobody(
    redis: Redis, router_settings: RouterSettings, tenancy: Tenancy
) -> None:
    reached = router_settings.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(ConfigError, match="asks nobody for a key: set QAQ_TENANTS_FILE"):
        await RouterServer(reached).start()
    for path, said in ((None, 1), (tenancy.path, 0)):
        settings = reached.model_copy(update={"insecure": True, "tenants_file": path})
        with structlog.testing.capture_logs() as logs:
            router = RouterServer(settings)
            await router.start()
            await router.stop()
        assert len([each for each in logs if "no tenants file" in each["event"]]) == said


async def test_two_different_keys_are_refused(channel: grpc.aio.Channel, tenancy: Tenancy) -> None:
    """Whoever reads the first one and whoever reads the last one must not see different callers."""
    ada, bob = (authorization(tenancy.keys[name]) for name in ("ada", "bob"))
    for metadata in ((*ada, *bob), (*bob, *ada), (*ada, ("authorization", "Bearer x"))):
        for method in INFERENCE.methods:
            error = await refusal(channel, method, metadata)
            assert (error.code(), error.details()) == (
                Code.INVALID_ARGUMENT,
                "authorization has 2 different values; send one",
            )
    named = (("qaq-tenant", "ada"), ("qaq-tenant", "bob"))
    assert (
        "qaq-tenant has 2 different values" in (await refusal(channel, INFERENCE.methods[0], (*ada, *named))).details()
    )
    assert await answers(channel, INFERENCE.methods_by_name["GetModel"], (*ada, *ada))
