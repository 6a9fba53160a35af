"""What the servers of a stack stand on: Redis and Ray's own processes, and what is done when one of them ends.

Redis is started again, empty: what runs goes on, and is written down again. Ray's servers end with its raylet, and are
not started again without it, so then the stack ends and says why.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil
import structlog

from services.cluster.remains import runs
from services.cluster.restarts import BEAT_S, Life
from services.cluster.state import StackError
from services.common.embedded_redis import EmbeddedRedis

_RAY = ("raylet", "gcs_server")
_REDIS = "redis"

log = structlog.get_logger()


class FoundationError(StackError):
    """The stack cannot go on; the message says what has ended, and why."""


class Foundation:
    """The processes below the servers, all children of this one.

    Args:
        directory: of the stack.
    """

    def __init__(self, redis: EmbeddedRedis, directory: Path) -> None:
        self._redis, self._directory = redis, directory
        self._of_ray: dict[str, tuple[psutil.Process, Life]] = {}
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # another child, that has ended
                if (name := child.name()) in _RAY:
                    self._of_ray[name] = child, Life(directory, name, child.pid)
        self._redis_life: Life | None = None
        self._follow_redis(restarted=False)
        self._looked_at = time.monotonic()

    def check(self) -> None:
        """Starts Redis again if it has ended. To be called every few tenths of a second.

        Raises:
            FoundationError: a process of Ray has ended, or Redis does not start.
        """
        for name, (process, life) in self._of_ray.items():
            if not runs(process):
                raise FoundationError(
                    f"Ray's {name} has ended, and the stack with it: {life.end()}; start it again with `qaq up`"
                )
        if self._redis_life is not None and not _lives(self._redis.pid):
            self._restart_redis()
        if time.monotonic() - self._looked_at > BEAT_S:
            self._looked_at = time.monotonic()
            lives = [life for _, life in self._of_ray.values()]
            for life in [*lives, self._redis_life] if self._redis_life else lives:
                life.say_alive()

    def _restart_redis(self) -> None:
        try:
            self._redis.start()
        except Exception as error:
            raise FoundationError(
                f"Redis has ended, and the stack with it: it does not start again ({error})"
            ) from error
        self._follow_redis(restarted=True)
        assert self._redis_life is not None
        log.warning("Redis was started again without its data", why=self._redis_life.record.why)

    def _follow_redis(self, *, restarted: bool) -> None:
        if self._redis.pid is not None:  # else it is a configured one, of somebody else
            self._redis_life = Life(self._directory, _REDIS, self._redis.pid)
            self._redis_life.begin(restarted=restarted)


def _lives(pid: int | None) -> bool:
    try:
        return pid is not None and runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False
