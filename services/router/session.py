"""The facts of one session, and how they are read from Redis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf.message import DecodeError
from qaq.v1 import common_pb2
from redis.exceptions import RedisError

from services.common.log import once
from services.common.precision import MAX_FLOOR

log = structlog.get_logger()

VERSION = 1
"""Of a session's facts, log and pages. A session of another version is as if it did not exist."""


@dataclass(frozen=True)
class Session:
    """Facts of one session.

    Attributes:
        kept: the client opened it, and it outlives its generations.
        worker: address of the worker that has its cache, or "".
        opened_at: seconds since the epoch.
        branch_of: the session that it was copied from, or "".
        tenant: whose it is.
        lambda_floor: the least price of a bit in its cache; 0 is none.
    """

    id: str
    model: str
    cache: common_pb2.CacheParams
    kept: bool
    worker: str
    opened_at: float
    branch_of: str = ""
    tenant: str = ""
    lambda_floor: float = 0.0

    def facts(self) -> dict[str, Any]:
        """What is written down of it."""
        return {
            "version": VERSION,
            "model": self.model,
            "cache": self.cache.SerializeToString(),
            "kept": int(self.kept),
            "worker": self.worker,
            "opened_at": repr(self.opened_at),
            "branch_of": self.branch_of,
            "tenant": self.tenant,
            "lambda_floor": repr(self.lambda_floor),
        }

    @classmethod
    def parse(cls, identifier: str, facts: Any) -> Session | None:
        """A session as it was written down; None, and logged once, if that is damaged."""
        try:
            if isinstance(facts, RedisError):
                raise ValueError(facts)
            if (version := facts.get(b"version", b"1")) != str(VERSION).encode():
                raise ValueError(f"version {version!r} is of another release")
            opened_at = float(facts[b"opened_at"])
            if not math.isfinite(opened_at):
                raise ValueError(f"opened_at is {opened_at}")
            floor = float(facts.get(b"lambda_floor", 0))
            if not 0 <= floor <= MAX_FLOOR:
                raise ValueError(f"lambda_floor is {floor}")
            return cls(
                identifier,
                facts[b"model"].decode(),
                common_pb2.CacheParams.FromString(facts[b"cache"]),
                facts[b"kept"] == b"1",
                facts[b"worker"].decode(),
                opened_at,
                facts.get(b"branch_of", b"").decode(),
                facts.get(b"tenant", b"").decode(),
                floor,
            )
        except (KeyError, ValueError, DecodeError) as error:
            if once(f"session {identifier}"):
                log.warning(
                    "a session's facts are damaged; it is as if it did not exist", session=identifier, reason=str(error)
                )
            return None
