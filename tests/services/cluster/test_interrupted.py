"""A start that is interrupted leaves no process and no file, whatever is killed, how, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import psutil
import pytest

from services.cluster import claim, control
from services.cluster.stack import python_path
from services.cluster.state import Owner

from ...e2e.command import qaq, until_nothing_is_left, watched

long = pytest.mark.skipif(os.environ.get("QAQ_FAULTS") != "long", reason="make faults, or QAQ_FAULTS=long, runs it")
pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.model, pytest.mark.slow]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path / "state"))
    with watched() as directory:
        monkeypatch.setenv("TMPDIR", str(directory))
        yield directory


def _interruptible() -> None:
    """A shell's background jobs ignore interrupts, and so would what they start."""
    for number in (SIGINT, SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(command: str, line: str) -> subprocess.Popen[str]:
    """A start that has just said a line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", command, *(["--port", "0"] if command == "up" else [])],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_interruptible,
    )
    assert process.stderr is not None
    seen = []
    for said in process.stderr:
        seen.append(said)
        if said.startswith(line):
            return process
    raise AssertionError("".join(seen))


@pytest.mark.parametrize(
    ("command", "line", "signals"),
    [
        ("up", "redis: starting", [SIGINT]),
        ("up", "ray: starting", [SIGINT, SIGINT]),
        ("up", "ray: starting", [SIGKILL]),
        pytest.param("up", "ray: head", [SIGKILL], marks=long),
        pytest.param("up", "redis: starting", [SIGTERM], marks=long),
        pytest.param("demo", "ray: starting", [SIGHUP], marks=long),
        pytest.param("demo", "worker-0: loading", [SIGTERM, SIGTERM], marks=long),
    ],
)
def test_the_command(command: str, line: str, signals: list[signal.Signals], place: Path) -> None:
    process = started(command, line)
    for number in signals:
        process.send_signal(number)
    assert process.wait(200) == (130 if SIGINT in signals else -SIGKILL if SIGKILL in signals else 128 + signals[0])
    assert process.stderr is not None
    until_nothing_is_left(place)
    if signals == [SIGINT]:
        told = process.stderr.read()
        assert "stack: stopping Redis, Ray and the servers" in told
        assert told.rstrip().endswith("interrupted")
    assert claim.current() is None
    process.stderr.close()


@pytest.mark.parametrize(
    ("victim", "line"),
    [
        ("stack", "ray: head"),
        pytest.param("guard", "ray: starting", marks=long),
        pytest.param("host", "ray: head", marks=long),
    ],
)
def test_what_owns_the_stack(victim: str, line: str, place: Path) -> None:
    process = started("up", line)
    owner = claim.current()
    assert isinstance(owner, Owner)
    assert owner.directory.stat().st_mode & 0o777 == 0o700
    guard = psutil.Process(owner.pid)
    (host,) = guard.children()
    assert "services.cluster.host" in host.cmdline()
    for one in {"guard": [guard], "host": [host], "stack": [guard, host]}[victim]:
        one.kill()
    assert process.wait(200) == 1
    assert process.stderr is not None
    told = process.stderr.read()
    assert "the stack's process ended" in told
    if victim == "stack":  # nobody was left who could do it
        shown = qaq("status")
        assert (shown.returncode, "clean up with `qaq down`" in shown.stderr) == (1, True)
        assert control.down()
    until_nothing_is_left(place)
    assert control.down() is (victim == "guard")
    assert claim.current() is None
    process.stderr.close()


def test_down_while_it_starts(place: Path) -> None:
    process = started("up", "redis: ")
    again = qaq("up", "--port", "0")
    assert (again.returncode, "a stack is starting or stopping already" in again.stderr) == (1, True)
    assert control.down()
    assert process.wait(200) == 1
    assert process.stderr is not None
    assert "the stack was stopped while it started" in process.stderr.read()
    process.stderr.close()
    until_nothing_is_left(place)
    assert not control.down()
