"""Where QAQ keeps what it does not want to compute twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$QAQ_CACHE_DIR`, or ~/.cache/qaq. Everything in it may be deleted at any time."""
    return Path(os.environ.get("QAQ_CACHE_DIR") or Path.home() / ".cache" / "qaq")
