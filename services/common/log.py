"""Structured logs on stderr: readable on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import OrderedDict
from typing import Any, TextIO, cast

import stamina.instrumentation
import structlog

MAX_SEEN = 4096

_seen: OrderedDict[str, None] = OrderedDict()
_lock = threading.Lock()


class _Stderr:
    """Standard error, wherever it goes; what cannot be written is lost, and whoever tells it goes on."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def _wanted(record: logging.LogRecord) -> bool:
    """Not what gRPC says, with a traceback, of each answer whose client has gone away."""
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


def configure(level: str = "info") -> None:
    """Configures logging of this process. Retries are counted in metrics instead of logged."""
    stamina.instrumentation.set_on_retry_hooks([])
    logging.getLogger("grpc._cython.cygrpc").addFilter(_wanted)
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
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Stderr())),
    )


def once(key: str) -> bool:
    """True the first time a key is seen in this process: `if once("redis-full"): log.warning(…)`.

    Of keys that name pages, sessions or addresses there may be any number: only the `MAX_SEEN` seen last are known.
    """
    with _lock:
        first = key not in _seen
        _seen[key] = None
        _seen.move_to_end(key)
        if len(_seen) > MAX_SEEN:
            _seen.popitem(last=False)
        return first
