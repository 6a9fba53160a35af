"""The `qaq` command. Commands import what they need when they run, so that `qaq --help` is quick."""

import os
import sys

# Before torch is imported. Threads that wait for each other would otherwise spin for milliseconds, on processors
# that a router, a cache service and Redis want too: torch's operations then take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def run() -> None:
    """Runs `qaq`; if the packages that every command needs are missing, says what to install."""
    try:
        from services.cli.main import app
    except ModuleNotFoundError as error:
        from services.common.extras import advice

        sentence = advice(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")
    except KeyboardInterrupt:
        sys.exit(130)
    app()
