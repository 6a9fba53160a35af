"""The end of what a stack stands on is noticed and told: Redis is started again, without Ray the stack ends."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from structlog.testing import capture_logs
from typer.testing import CliRunner

from services.cli.main import app
from services.cluster import foundation, restarts, state
from services.cluster.foundation import Foundation, FoundationError
from services.common.embedded_redis import EmbeddedRedis, RedisStartError

pytestmark = pytest.mark.redis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(directory=tmp_path / "redis") as server:
        yield server


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child with the name of Ray's."""
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / "raylet")
    process = subprocess.Popen([program, "600"])
    while psutil.Process(process.pid).name() != "raylet":
        pass
    yield process
    process.kill()
    process.wait()


def test_redis_is_started_again(tmp_path: Path, server: EmbeddedRedis, raylet: subprocess.Popen[bytes]) -> None:
    below, url, pid = Foundation(server, tmp_path), server.url, server.pid
    below.check()
    assert server.pid == pid
    assert pid is not None
    psutil.Process(pid).kill()
    psutil.Process(pid).wait()
    with capture_logs() as logs:
        below.check()
    assert (server.url, server.pid != pid) == (url, True)
    assert redis.Redis.from_url(url).ping()
    assert "started again" in logs[0]["event"]
    record = restarts.restarted(tmp_path)["redis"]
    assert (record.restarts, f"(pid {pid}) was killed or crashed" in record.why) == (1, True)


def test_redis_that_does_not_start_again(
    tmp_path: Path, server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = Foundation(server, tmp_path)

    def fails() -> None:
        raise RedisStartError("there is no room")

    monkeypatch.setattr(server, "start", fails)
    server.terminate()
    with pytest.raises(FoundationError, match=r"does not start again \(there is no room\)"):
        below.check()


def test_without_ray_the_stack_ends(tmp_path: Path, server: EmbeddedRedis, raylet: subprocess.Popen[bytes]) -> None:
    below = Foundation(server, tmp_path)
    raylet.kill()  # nobody waits for it: it is a zombie
    while psutil.Process(raylet.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    with pytest.raises(
        FoundationError, match=rf"^Ray's raylet has ended, .*\(pid {raylet.pid}\) was killed or crashed"
    ):
        below.check()


def test_why_it_was_killed(
    tmp_path: Path, server: EmbeddedRedis, raylet: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("oom_kill 4\n")
    monkeypatch.setattr(restarts, "_VMSTAT", vmstat)
    below = Foundation(server, tmp_path)
    raylet.kill()
    raylet.wait()
    monkeypatch.setenv(restarts.MONITOR, "250")
    with pytest.raises(FoundationError, match="perhaps by Ray's memory monitor"):
        below.check()
    vmstat.write_text("oom_kill 5\n")
    with pytest.raises(FoundationError, match="memory was short: the kernel killed a process at that time"):
        below.check()


def test_it_says_now_and_then_that_all_live(
    tmp_path: Path, server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = Foundation(server, tmp_path)
    path = tmp_path / "servers" / "redis.json"
    before = path.read_bytes()
    below.check()
    assert path.read_bytes() == before
    monkeypatch.setattr(foundation, "BEAT_S", -1.0)
    below.check()
    assert path.read_bytes() != before


def test_a_configured_redis_is_of_somebody_else(tmp_path: Path, server: EmbeddedRedis) -> None:
    Foundation(EmbeddedRedis(server.url), tmp_path).check()
    assert not (tmp_path / "servers").exists()


def test_status_tells_why_the_last_stack_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))
    state.say_why("Ray's raylet has ended")
    told = CliRunner().invoke(app, ["status"])
    said = " ".join(told.output.split())
    assert (told.exit_code, "the last one ended by itself: 20" in said, "raylet has ended)" in said) == (1, True, True)
    down = CliRunner().invoke(app, ["down"])
    assert "No stack is running." in down.output
    assert "ended by itself" not in CliRunner().invoke(app, ["status"]).output
