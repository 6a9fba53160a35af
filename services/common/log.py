"""Structured logs on stderr: readable on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

import stamina.instrumentation
import structlog

_seen: set[str] = set()
_lock = threading.Lock()


def configure(level: str = "info") -> None:
    """Configures logging of this process. Retries are counted in metrics instead of logged."""
    stamina.instrumentation.set_on_retry_hooks([])
    terminal = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    errors = [] if terminal else [structlog.processors.format_exc_info]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *errors,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def once(key: str) -> bool:
    """True the first time a key is seen in this process: `if once("redis-full"): log.warning(…)`."""
    with _lock:
        first = key not in _seen
        _seen.add(key)
        return first
