"""What a stack on a Ray cluster is refused for before anything starts, and what its servers are handed."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from services.cluster import deploy, state
from services.cluster.handed import Handed
from services.cluster.nodes import Node
from services.cluster.state import StackError, StackSettings, StackState
from services.common.certificates import issue
from services.common.server_identity import identity
from services.common.settings import RouterSettings, WorkerSettings
from services.common.tenants import add_key
from services.router.callers import Callers
from tests.e2e.command import here

ONE, TWO = Node("a", "10.0.0.1", gpus=1), Node("b", "10.0.0.2")
REDIS = "redis://10.0.0.9:6379/0"


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))
    for name in ("QAQ_REDIS_URL", "QAQ_INSECURE", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def refused(*arguments: str, **environment: str) -> str:
    told = here("up", "--model", "m", *arguments, **environment)
    assert told.returncode != 0
    return " ".join(told.stderr.split())


def test_without_a_redis_that_all_nodes_reach() -> None:
    assert "needs a Redis that all of them reach: give --redis-url, or set QAQ_REDIS_URL" in refused(
        "--address", "10.0.0.1:6379"
    )
    assert "must begin with redis://" in refused("--address", "10.0.0.1:6379", "--redis-url", "10.0.0.9")
    with pytest.raises(StackError, match="is on one machine alone, and the cluster has 2"):
        deploy._check_nodes(StackSettings(model="m"), "redis://127.0.0.1:6379", [ONE, TWO])


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://10.0.0.1:10001"])
def test_without_a_token(address: str) -> None:
    told = refused("--address", address, QAQ_REDIS_URL=REDIS)
    assert f"Ray at {address} asks for no token" in told
    assert "RAY_AUTH_MODE=token" in told


def test_options_of_a_cluster_want_one() -> None:
    for option in (("--redis-url", REDIS), ("--host", "a"), ("--worker-cpus", "1")):
        assert "give --address too" in refused(*option)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"device": "cuda", "workers": 2}, "2 workers need a GPU each, and the cluster's nodes have 1"),
        ({"device": "cuda:0"}, "take cuda, not cuda:0"),
        ({"tls": False}, "--no-tls is for one machine"),
    ],
)
def test_nodes_that_are_not_fit(settings: dict[str, Any], told: str) -> None:
    deploy._check_nodes(StackSettings(model="m"), REDIS, [ONE, TWO])
    with pytest.raises(StackError, match=told):
        deploy._check_nodes(StackSettings(model="m", **settings), REDIS, [ONE, TWO])


def test_one_stack_a_state_directory(tmp_path: Path) -> None:
    known: dict[str, Any] = {"settings": StackSettings(model="m"), "redis": {}, "router": "10.0.0.1:7700"}
    running = StackState(
        pid=0, born=0, directory=tmp_path, ray_address="10.0.0.1:6379", address="10.0.0.1:6379", **known
    )
    assert running.alive
    state.save(running)
    told = "a stack was started on the Ray cluster at 10.0.0.1:6379; stop it with `qaq down`"
    assert told in refused("--port", "0")
    assert told in refused("--address", "10.0.0.1:6379", QAQ_REDIS_URL=REDIS)


def test_a_server_is_who_it_is_from_memory(tmp_path: Path) -> None:
    """Its certificate fits its role, the router knows its tenants, and no file of theirs has a name."""
    issue(tmp_path / "tls")
    key = add_key(tmp_path / "tenants.json", "acme")
    tenants = (tmp_path / "tenants.json").read_bytes()
    worker = Handed.of(tmp_path / "tls", "worker").placed(WorkerSettings(model="m"), "10.0.0.2")
    router = Handed.of(tmp_path / "tls", "router", tenants).placed(RouterSettings(model="m"), "10.0.0.1")
    for path in tmp_path.rglob("*.*"):
        path.unlink()
    for settings, role, host in ((worker, "worker", "10.0.0.2"), (router, "router", "10.0.0.1")):
        assert settings.host == host
        assert identity(settings) is not None, role
        assert settings.tls_key is not None
        assert str(settings.tls_key).startswith("/proc/self/fd/")
        assert stat.S_IMODE(settings.tls_key.stat().st_mode) == 0o600
    assert Callers(router.tenants_file).known((("authorization", f"Bearer {key}"),)).tenant == "acme"


def test_an_address_that_was_chosen_stays() -> None:
    handed = Handed()
    named = handed.placed(WorkerSettings(model="m", host="10.9.9.9"), "10.0.0.2")
    every = handed.placed(WorkerSettings(model="m", host="0.0.0.0"), "10.0.0.2")
    assert (named.host, named.advertise_host) == ("10.9.9.9", None)
    assert (every.host, every.advertise_host) == ("0.0.0.0", "10.0.0.2")
