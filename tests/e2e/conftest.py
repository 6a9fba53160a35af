"""One stack of plain processes with the real model, for all tests that only talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from qaq.v1 import generate_pb2_grpc

from services.common.channel import open_channel
from services.common.keys import WithMetadata, authorization

from .composed import Composed


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """The services of docker-compose.yml, started once."""
    services = Composed(tmp_path_factory.mktemp("composed"))
    try:
        services.start()
        yield services
    finally:
        services.stop()


@pytest.fixture
async def client(composed: Composed) -> AsyncIterator[WithMetadata]:
    async with open_channel(composed.addresses["router"], composed.identity("client"), "router") as channel:
        yield WithMetadata(generate_pb2_grpc.InferenceStub(channel), authorization(composed.key))


@pytest.fixture
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `qaq up` of a test writes itself down."""
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"
