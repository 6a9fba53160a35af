"""TLS between gRPC servers and clients: right, foreign, expired, missing and renewed certificates."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from qaq.v1 import generate_pb2 as pb
from qaq.v1 import generate_pb2_grpc
from structlog.testing import capture_logs

from qaq_core.base.errors import ConfigError
from services.common import identity as identity_module
from services.common import tls
from services.common.certificates import files, issue
from services.common.channel import open_blocking_channel, open_channel
from services.common.identity import Identity, Pems
from services.common.roles import Role

from .streaming import Counting, counting_server

Stub = generate_pb2_grpc.InferenceStub
Code = grpc.StatusCode
SECOND = 1 / 86400
EXPIRING: tuple[Role, ...] = ("client", "router")


@pytest.fixture(autouse=True)
def looked_at_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test does not wait for the files' next look."""
    monkeypatch.setattr(identity_module, "CHECK_S", 0.0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The certificates of a deployment."""
    issue(tmp_path / "ours")
    return tmp_path / "ours"


def of(directory: Path, role: Role) -> Identity:
    return Identity(*files(directory, role))


@pytest.fixture
async def served(place: Path) -> AsyncIterator[tuple[str, Counting]]:
    """A router that asks for certificates."""
    server, service = counting_server(of(place, "router"))
    yield await server.start(), service
    await server.stop(0)


async def tokenize(channel: grpc.aio.Channel) -> list[int]:
    return list((await Stub(channel).Tokenize(pb.TokenizeRequest(text="four"), timeout=5)).token_ids)


async def refused(channel: grpc.aio.Channel) -> None:
    """No connection comes about."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokenize(channel)
    assert caught.value.code() is Code.UNAVAILABLE


def raw(address: str, pems: Pems) -> grpc.aio.Channel:
    """A channel of a client that checks nothing of its own files."""
    options = [("grpc.ssl_target_name_override", "router.qaq.internal")]
    return grpc.aio.secure_channel(address, tls.channel_credentials(pems), options=options)


async def test_the_right_certificate(served: tuple[str, Counting], place: Path) -> None:
    address, _ = served
    async with open_channel(address, of(place, "client"), "router") as channel:
        assert await tokenize(channel) == [4]
    with open_blocking_channel(address, of(place, "client"), "router") as blocking:
        reply = await asyncio.to_thread(Stub(blocking).Tokenize, pb.TokenizeRequest(text="four"), timeout=5)
    assert list(reply.token_ids) == [4]


async def test_a_server_of_another_role(served: tuple[str, Counting], place: Path) -> None:
    async with open_channel(served[0], of(place, "worker"), "originals") as channel:
        await refused(channel)


async def test_no_certificate(served: tuple[str, Counting], place: Path) -> None:
    async with open_channel(served[0], Identity(place / "ca.pem"), "router") as channel:
        await refused(channel)
    async with open_channel(served[0]) as channel:  # and no TLS
        await refused(channel)


async def test_a_certificate_of_another_ca(served: tuple[str, Counting], place: Path, tmp_path: Path) -> None:
    issue(tmp_path / "foreign")
    _, cert, key = of(tmp_path / "foreign", "client").pems
    async with raw(served[0], Pems((place / "ca.pem").read_bytes(), cert, key)) as channel:
        await refused(channel)
    async with open_channel(served[0], of(tmp_path / "foreign", "client"), "router") as channel:  # nor is the server's
        await refused(channel)


async def test_two_cas_are_trusted_while_one_takes_the_place_of_the_other(
    served: tuple[str, Counting], place: Path, tmp_path: Path
) -> None:
    issue(tmp_path / "next")
    both = (place / "ca.pem").read_bytes() + (tmp_path / "next" / "ca.pem").read_bytes()
    (place / "router" / "ca.pem").write_bytes(both)
    _, cert, key = of(tmp_path / "next", "client").pems
    async with raw(served[0], Pems(both, cert, key)) as moved, open_channel(served[0], of(place, "client")) as not_yet:
        assert await tokenize(moved) == await tokenize(not_yet) == [4]


async def test_a_client_without_a_certificate_where_none_is_asked_for(place: Path) -> None:
    server, _ = counting_server(of(place, "router"), certificates=False)
    address = await server.start()
    try:
        async with open_channel(address, Identity(place / "ca.pem"), "router") as channel:
            assert await tokenize(channel) == [4]
        # As any gRPC client does it, by the host's name.
        ca = grpc.ssl_channel_credentials((place / "ca.pem").read_bytes())
        async with grpc.aio.secure_channel(address, ca) as channel:
            assert await tokenize(channel) == [4]
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials()) as channel:
            await refused(channel)
    finally:
        await server.stop(0)


@dataclass
class Shown:
    """Files that an identity would refuse."""

    pems: Pems


async def test_expired_certificates_until_they_are_renewed(place: Path) -> None:
    """In both directions. Nothing restarts."""
    issue(place, days=-SECOND)
    expired = {role: contents(place, role) for role in EXPIRING}
    issue(place)
    shown = Shown(expired["router"])
    server, _ = counting_server(shown)  # type: ignore[arg-type]
    address = await server.start()
    try:
        async with open_channel(address, of(place, "client"), "router") as channel:
            await refused(channel)
        shown.pems = contents(place, "router")
        async with open_channel(address, of(place, "client"), "router") as channel:
            assert await tokenize(channel) == [4]
        async with raw(address, expired["client"]) as channel:
            await refused(channel)
    finally:
        await server.stop(0)


def contents(place: Path, role: Role) -> Pems:
    return Pems(*(path.read_bytes() for path in files(place, role)))


async def test_everything_is_replaced_while_a_stream_runs(served: tuple[str, Counting], place: Path) -> None:
    """The CA too: old and new certificates do not know each other."""
    address, service = served
    before = of(place, "client").pems
    async with open_channel(address, of(place, "client"), "router") as channel:
        call = Stub(channel).Generate(pb.GenerateRequest(stop={"max_new_tokens": 3}))
        service.step.release()
        assert (await call.read()).session_id == "0"
        shutil.rmtree(place)
        issue(place)
        assert await tokenize(channel) == [4]
        async with raw(address, before) as old:
            await refused(old)
        for index in ("1", "2"):
            service.step.release()
            assert (await call.read()).session_id == index
        assert await call.read() is grpc.aio.EOF


async def test_a_closed_channel_gives_its_calls_their_time_on_old_connections_too(
    served: tuple[str, Counting], place: Path
) -> None:
    address, service = served
    channel = open_channel(address, of(place, "client"), "router")
    call = Stub(channel).Generate(pb.GenerateRequest(stop={"max_new_tokens": 2}))
    service.step.release()
    assert (await call.read()).session_id == "0"
    issue(place)
    assert await tokenize(channel) == [4]
    closing = asyncio.create_task(channel.close(30))
    await asyncio.sleep(0.05)
    service.step.release()
    assert (await call.read()).session_id == "1"
    assert await call.read() is grpc.aio.EOF
    await closing
    assert not channel._leaving


async def test_a_renewal_that_is_half_done_changes_nothing(served: tuple[str, Counting], place: Path) -> None:
    address, _ = served
    identity = of(place, "client")
    before = identity.pems
    async with open_channel(address, identity, "router") as channel:
        shutil.copy(place / "worker" / "key.pem", place / "client" / "key.pem")
        with capture_logs() as logs:
            assert await tokenize(channel) == [4]
            assert identity.pems is before
        assert [entry["log_level"] for entry in logs] == ["warning"]
        assert "is not the key of" in logs[0]["reason"]
        (place / "client" / "cert.pem").unlink()
        assert await tokenize(channel) == [4]
        issue(place)
        assert identity.pems is not before
        assert await tokenize(channel) == [4]


def test_files_that_cannot_be_used_are_told(place: Path) -> None:
    ca, cert, key = files(place, "worker")
    with pytest.raises(ConfigError, match=r"none\.pem cannot be read"):
        Identity(ca, place / "none.pem", key)
    with pytest.raises(ConfigError, match=r"key\.pem has no certificate"):
        Identity(ca, key, key)
    with pytest.raises(ConfigError, match=r"cert\.pem has no private key"):
        Identity(ca, cert, cert)
    with pytest.raises(ConfigError, match="is not the key of the certificate"):
        Identity(ca, cert, place / "router" / "key.pem")
    issue(place, days=-SECOND)
    with pytest.raises(ConfigError, match="expired"):
        Identity(ca, cert, key)
