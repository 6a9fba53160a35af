"""The end of a stack's processes: all of them, and nobody else's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.cluster import claim, remains, state
from services.cluster.remains import MARK
from services.cluster.state import Owner, StackError
from services.common.embedded_redis import EmbeddedRedis

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)",
]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))
    made = tmp_path / "qaq-stack"
    made.mkdir(0o700)
    return made


@pytest.fixture
def run() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def marked(directory: Path, command: list[str], **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=os.environ | {MARK: str(directory)}, stdout=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]


def test_processes_end_and_others_stay(directory: Path, run: list[subprocess.Popen[str]]) -> None:
    # The child of a shell has its environment replaced: it is found by its parent.
    hidden = ["sh", "-c", f"env -i {sys.executable} -c 'import time; time.sleep(60)' & echo $!; wait"]
    mine = [marked(directory, SLEEP), marked(directory, hidden)]
    other = subprocess.Popen(SLEEP, env=os.environ | {MARK: str(directory) + "x"}, text=True)
    visitor = subprocess.Popen(SLEEP, cwd=directory, text=True)  # somebody who looks at the logs
    run += [*mine, other, visitor]
    assert mine[1].stdout is not None
    child = psutil.Process(int(mine[1].stdout.readline()))
    remains.clear(directory)
    assert not any(psutil.pid_exists(process.pid) for process in mine)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not directory.exists()
    assert [other.poll(), visitor.poll()] == [None, None]


def test_one_that_does_not_want_to_end(
    directory: Path, run: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remains, "TERMINATE_S", 0.2)
    stubborn = marked(directory, STUBBORN)
    run.append(stubborn)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    remains.clear(directory)
    assert not psutil.pid_exists(stubborn.pid)


@pytest.mark.redis
def test_redis_is_found_by_where_it_works(directory: Path) -> None:
    server = EmbeddedRedis(directory=directory / "redis").start()
    assert server.pid is not None
    assert [process.pid for process in remains.processes(directory)] == [server.pid]
    remains.clear(directory)
    assert remains.processes(directory) == []
    assert not directory.exists()


@pytest.mark.redis
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not do it")
def test_redis_ends_with_the_process_that_started_it(directory: Path) -> None:
    program = (
        "import pathlib, sys, time; from services.common.embedded_redis import EmbeddedRedis; "
        "print(EmbeddedRedis(directory=pathlib.Path(sys.argv[1])).start().pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, directory / "redis"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    redis = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not redis.is_running() or redis.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError("Redis runs on")


def owner(directory: Path, pid: int | None = None) -> Owner:
    process = psutil.Process(pid)
    return Owner(pid=process.pid, born=process.create_time(), directory=directory)


def test_one_owner_at_a_time(directory: Path) -> None:
    assert claim.current() is None
    with claim.claimed(owner(directory)):
        found = claim.current()
        assert found == owner(directory)
        assert found.alive
        assert (state.directory() / "owner.json").stat().st_mode & 0o777 == 0o600
        taken = rf"starting or stopping already \(process {os.getpid()}\)"
        with pytest.raises(StackError, match=taken), claim.claimed(owner(directory)):
            pass
        claim.clean()  # nothing, because the owner lives
        assert directory.exists()
        assert claim.current() == found
    assert claim.current() is None


def test_what_a_killed_owner_has_left_is_ended(directory: Path, run: list[subprocess.Popen[str]]) -> None:
    left = marked(directory, SLEEP)
    run.append(left)
    record = owner(directory).model_copy(update={"born": 1.0})
    state.directory().mkdir()
    (state.directory() / "owner.json").write_text(record.model_dump_json())
    found = claim.current()
    assert found is not None
    assert not found.alive
    after = directory.parent / "after"
    with claim.claimed(owner(after)):
        assert not psutil.pid_exists(left.pid)
        assert not directory.exists()
        assert claim.current() == owner(after)


def test_a_stack_without_a_record_is_found_by_its_directory(
    directory: Path, run: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of `qaq demo` is, whose guard and host were both killed."""
    lives, unclaimed = directory.parent / "qaq-lives", directory.parent / "qaq-other"
    for each in (lives, unclaimed):
        each.mkdir(0o700)
    left = marked(directory, SLEEP)
    run.append(left)
    with claim.marked(owner(lives)):
        with claim.marked(owner(directory)):
            assert claim.clear_abandoned(directory.parent) == []
        monkeypatch.setattr(remains, "base", lambda: directory.parent)
        claim.clean()
        assert not psutil.pid_exists(left.pid)
        assert (directory.exists(), lives.exists(), unclaimed.exists()) == (False, True, True)


def test_a_damaged_record_is_told(directory: Path) -> None:
    state.directory().mkdir()
    (state.directory() / "owner.json").write_text("{")
    with pytest.raises(StackError, match=r"owner\.json is damaged"):
        claim.current()


def test_a_claim_without_room_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    full_disk = r"No space left on device.*QAQ_STATE_DIR"
    with pytest.raises(StackError, match=full_disk), claim.claimed(owner(directory)):
        pass


def test_no_room_for_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.cluster import guard

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(StackError, match=r"has 1 MB free.*set TMPDIR"):
        guard._free_name()
    monkeypatch.setattr("tempfile.gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError(2, "none is usable")))
    with pytest.raises(StackError, match=r"none is usable.*set TMPDIR"):
        guard._free_name()
