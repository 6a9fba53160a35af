"""Fixtures that every folder uses, and the marks of what a test needs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import schedule

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from xdist.scheduler import Scheduling

    from qaq_core.models import LoadedModel
    from services.common.embedded_redis import EmbeddedRedis

# The tests' tensors are small, and there are other processes: more threads wait for each other most of the time.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test is marked by the fixtures that it asks for, directly or through others, and by its folder.
MARKS_OF_FIXTURES = {"model_path": ["model"], "redis_server": ["redis"], "parts": ["slow"]}
MARKS_OF_FOLDERS = {
    "e2e": ["model", "redis", "slow"],
    "faults": ["model", "redis", "slow"],
    "fuzz": ["model", "redis", "slow"],
    "clients": ["model", "redis", "slow"],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--filled",
        action="store_true",
        help="fill memory that torch has not initialized: floats with NaN, integers with their largest number",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--filled"):
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
        torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda item: schedule.rank(item.path.relative_to(here).as_posix()))
    for item in items:
        marks = list(MARKS_OF_FOLDERS.get(item.path.relative_to(here).parts[0], []))
        for fixture in getattr(item, "fixturenames", []):
            marks += MARKS_OF_FIXTURES.get(fixture, [])
        for mark in set(marks):
            item.add_marker(mark)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    return schedule.make(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A real Redis server for the whole run."""
    from services.common.embedded_redis import EmbeddedRedis

    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
async def redis(redis_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    """A client of an emptied database."""
    from services.common.redis import connect

    client = connect(redis_server.url)
    await client.flushdb()
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The demo model's file."""
    from qaq_core.models import default_model_path

    return default_model_path()


@pytest.fixture(scope="session")
def whole_smollm2(model_path: Path) -> LoadedModel:
    """The demo model, float32 on the CPU. Shared: leave its weights and configuration as they are."""
    from qaq_core.models import load_model

    return load_model(str(model_path))


@pytest.fixture(scope="session")
def shallow_smollm2(whole_smollm2: LoadedModel) -> Iterator[LoadedModel]:
    """The demo model's first layers, for what depends neither on their number nor on what the text says."""
    from tests.shallow import shallow

    with shallow(whole_smollm2) as model:
        yield model


@pytest.fixture(scope="session")
def smollm2(whole_smollm2: LoadedModel) -> LoadedModel:
    """The demo model, unless a folder is served as well by a part of it."""
    return whole_smollm2
