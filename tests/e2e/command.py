"""Runs the `qaq` command as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

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


def left_running(mark: str) -> list[str]:
    """Command lines of processes that carry `QAQ_TEST_MARK=<mark>` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("QAQ_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
