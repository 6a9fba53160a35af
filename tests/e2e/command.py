"""Runs the `qaq` command as a user does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from typer.testing import CliRunner

from services.cli.main import app
from services.cluster.stack import python_path

ROOT = Path(__file__).parents[2]


def qaq(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Standard output and error, and the exit code."""
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": python_path(), "COLUMNS": "200"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )


def here(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `qaq`, but in this process, which has imported already what the command needs."""
    asked = list(map(str, arguments))
    done = CliRunner().invoke(app, asked, env=environment, catch_exceptions=False)
    return subprocess.CompletedProcess(asked, done.exit_code, done.stdout, done.stderr)


@contextlib.contextmanager
def watched() -> Iterator[Path]:
    """A temporary directory for all that a test starts, by which whatever is left of it is found."""
    directory = Path(tempfile.mkdtemp(prefix="qaqt-", dir="/tmp"))  # short, for Ray's sockets
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def left(directory: Path) -> list[str]:
    """Processes that were started with this temporary directory or work in it, and what lies in it."""
    found = [f"{path} is there" for path in directory.glob("qaq-*")]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.environ().get("TMPDIR") == str(directory)
            # Redis and Ray write titles over their environments, but have files in the directory.
            if not mine and next(iter(process.cmdline()), "").startswith(("ray::", "/")):
                files = [process.cwd(), *(file.path for file in process.open_files())]
                mine = any(file.startswith(str(directory)) for file in files)
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def until_nothing_is_left(directory: Path) -> None:
    for _ in range(900):
        if not left(directory):
            return
        time.sleep(0.1)
    raise AssertionError(left(directory))
