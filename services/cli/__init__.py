"""The `qaq` command. Commands import what they need when they run, so that `qaq --help` is quick."""

import os

# Before torch is imported. Threads that wait for each other would otherwise spin for milliseconds, on processors
# that a router, a cache service and Redis want too: torch's operations then take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from services.cli.main import app

__all__ = ["app"]
