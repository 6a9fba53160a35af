"""Files with secrets in them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import structlog

from services.common.log import once

log = structlog.get_logger()


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a file, or replaces it at once, so that nobody reads half of it or before it has its mode."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
    os.replace(name, path)


def warn_if_readable(path: Path) -> None:
    """Warns once of a secret's file that every user of the machine may read.

    It is no error: orchestrators mount secrets so, into containers that have one user.
    """
    with contextlib.suppress(OSError):  # whoever reads it tells
        if path.stat().st_mode & 0o004 and once(f"readable {path}"):
            log.warning("every user of this machine may read a secret file", file=str(path), advice=f"chmod o-r {path}")
