"""Uploads that have not ended: how many there may be and how many bytes they may hold, in all and from one peer."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from services.common.errors import ResourceExhausted

MAX_UPLOADS = 128
"""Half of the calls that a cache service takes at a time, so that others find a place."""

RETRY_AFTER_MS = 1000


class Uploads:
    """The uploads of a cache service. One peer, which is a host, gets three quarters of what there is.

    Args:
        budget: bytes of all uploads.

    Attributes:
        count: uploads that have not ended. held: bytes that they hold.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self._counts.total()

    @property
    def held(self) -> int:
        return self._bytes.total()

    @contextlib.contextmanager
    def begin(self, peer: str) -> Iterator[Upload]:
        """An upload, which holds nothing any more when the context ends.

        Args:
            peer: as gRPC names it, such as "ipv4:10.0.0.1:5000".
        Raises:
            ResourceExhausted: too many have not ended.
        """
        host = peer.rpartition(":")[0]
        if self.count >= MAX_UPLOADS or self._counts[host] >= MAX_UPLOADS * 3 // 4:
            raise ResourceExhausted(
                f"{self.count} uploads have not ended, {self._counts[host]} of them from this host; end those first",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._counts[host] += 1
        upload = Upload(self, host)
        try:
            yield upload
        finally:
            upload.drop()
            self._counts[host] -= 1
            if not self._counts[host]:
                del self._counts[host]

    def _hold(self, host: str, size: int) -> None:
        mine = self._bytes[host] + size
        if size > 0 and (self.held + size > self._budget or mine > self._budget * 3 // 4):
            raise ResourceExhausted(
                f"uploads that have not ended hold {self.held:,} bytes, {self._bytes[host]:,} of them from this host, "
                f"and {self._budget:,} are the most; end those first",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._bytes[host] = mine
        if not mine:
            del self._bytes[host]


class Upload:
    """What one upload holds."""

    def __init__(self, uploads: Uploads, host: str) -> None:
        self._uploads, self._host, self._held = uploads, host, 0

    def add(self, size: int) -> None:
        """Counts bytes that have come.

        Raises:
            ResourceExhausted: all uploads hold too many.
        """
        self._uploads._hold(self._host, size)
        self._held += size

    def drop(self) -> None:
        """The bytes are not held any more."""
        self._uploads._hold(self._host, -self._held)
        self._held = 0
