"""Logs outlive the process that wrote them, say what a crash says, and stay short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.cluster import logs
from services.cluster.stack import python_path
from tests.e2e.command import here

WRITES = """
import os, sys
from pathlib import Path
from services.cluster.logs import Log
log = Log(Path(sys.argv[1]), "worker-0", again=sys.argv[2] == "again", max_bytes=1000)
log.take()
for line in range(int(sys.argv[3])):
    print("line", line, flush=True)
    log.turn()
os.system("echo from below >&2")
os.abort()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAQ_STATE_DIR", str(tmp_path))
    return tmp_path


def written(lines: int, *, again: bool = False) -> None:
    """By a process that crashes."""
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-c",
        WRITES,
        str(logs.folder()),
        "again" if again else "",
        str(lines),
    ]
    done = subprocess.run(command, env={"PYTHONPATH": python_path(), "PATH": "/usr/bin:/bin"}, timeout=100)
    assert done.returncode == -6


def test_a_crash_is_in_the_log_and_stays_there() -> None:
    written(2)
    written(1, again=True)
    said = logs.tail(logs.found()["worker-0"], 100)
    assert [line for line in said if line.startswith("line")] == ["line 0", "line 1", "line 0"]
    assert said.count("from below") == 2
    assert "Fatal Python error: Aborted" in said
    assert (logs.folder() / "worker-0.log").stat().st_mode & 0o777 == 0o600
    shown = here("logs", "worker-0", "-n", "1000")
    assert shown.stdout.splitlines() == said


def test_it_is_bounded(place: Path) -> None:
    written(500)
    files = logs.found()["worker-0"]
    assert [path.name for path in files] == ["worker-0.log.1", "worker-0.log"]
    assert sum(path.stat().st_size for path in files) < 5000
    (place / "stack.log").write_text("the stack\n")
    assert "line 499" in logs.tail(files, 1000)
    listed = here("logs").stdout
    assert "worker-0: " in listed
    assert "stack: 10 B" in listed


def test_a_log_that_there_is_not() -> None:
    assert "there are no logs in" in here("logs").stderr
    written(0)
    assert "there is no log of router; there are worker-0" in here("logs", "router").stderr
