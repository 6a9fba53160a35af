"""What the Redis server of this machine can do."""

from __future__ import annotations

import re
import subprocess

from services.common.embedded_redis import find_server, server_version


def version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", server_version(find_server()[1])))


def has_tls() -> bool:
    """Whether it was built with TLS: otherwise it does not know the directive, instead of disliking its value."""
    tried = subprocess.run([find_server()[1], "--tls-port", "none"], capture_output=True, text=True)
    return "Bad directive" not in tried.stdout + tried.stderr
