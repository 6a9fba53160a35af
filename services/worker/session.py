"""A session on this worker: its token log and the cache of all of the log that was computed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from qaq_core import Method, Originals, PageShape, SequenceCache, page_id


class PageNames:
    """Content ids of a token log's pages, each chained to the one before.

    Args:
        tokens: the log; it may grow, but no page that was named may change.
    """

    def __init__(self, fingerprint: str, shape: PageShape, salt: bytes, tokens: Sequence[int]) -> None:
        self._fingerprint, self._shape, self._salt, self._tokens = fingerprint, shape, salt, tokens
        self._ids: list[bytes] = []

    def __call__(self, index: int) -> bytes:
        """The id of page `index`, whose tokens must all be known."""
        size = self._shape.tokens
        while len(self._ids) <= index:
            start = len(self._ids) * size
            own = self._tokens[start : start + size]
            if len(own) < size:
                raise IndexError(f"page {len(self._ids)} is named before its tokens are known")
            parent = self._ids[-1] if self._ids else b""
            self._ids.append(page_id(self._fingerprint, self._shape.dtype, self._salt, parent, own))
        return self._ids[index]


class Session:
    """Tokens and their cache. The cache may lack the end of the log; it never holds more.

    Args:
        tokens: the log so far.
        wait: decode waits for re-quantized rows.

    Attributes:
        counted: exceptions and missing originals of this cache that are in the metrics already.
    """

    def __init__(
        self,
        method: Method,
        originals: Originals,
        fingerprint: str,
        tokens: Sequence[int],
        salt: bytes = b"",
        wait: bool = False,
    ) -> None:
        self.method = method
        self.tokens = list(tokens)
        self._originals, self._fingerprint, self._salt, self._wait = originals, fingerprint, salt, wait
        self._prompt_left = 0
        self._open()

    @property
    def lacking(self) -> int:
        """Tokens of the log that the cache does not hold yet."""
        return len(self.tokens) - self.sequence.length

    @property
    def half_precision_bytes(self) -> int:
        """What the cached tokens would take at 16 bits an element."""
        shape = self.method.shape
        return self.sequence.length * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2

    @property
    def prefilling(self) -> bool:
        """The next forward pass is a chunk of a prompt and not one decoded token."""
        return self._prompt_left > 0 or self.lacking > 1

    def continues_in(self, log: Sequence[int], method: Method) -> bool:
        """True if the cache can be used to continue `log`: it holds a part of it and not all."""
        held = self.sequence.length
        same = method is self.method and self._prompt_left == 0
        return same and held < len(log) and self.tokens[:held] == list(log[:held])

    def resume(self, log: Sequence[int]) -> None:
        """Takes a log that `continues_in` agreed to."""
        held = self.sequence.length
        self.tokens[held:] = log[held:]

    def next_chunk(self, limit: int) -> list[int]:
        """The next tokens to compute, at most `limit`; the cache is told when a prompt begins."""
        if self._prompt_left == 0 and self.lacking > 1:
            self._prompt_left = self.lacking
            self.sequence.expect(self.lacking)
        held = self.sequence.length
        chunk = self.tokens[held : held + min(limit, self._prompt_left or 1)]
        self._prompt_left = max(0, self._prompt_left - len(chunk))
        return chunk

    def fork(self) -> Session:
        """A session with the same log and a copy of the cache, where no prompt may be arriving."""
        other = copy.copy(self)
        other.tokens = list(self.tokens)
        other.sequence = self.sequence.fork(other._names())
        other.counted = {"exceptions": 0, "originals_missing": 0}
        return other

    def rebuild(self) -> None:
        """Throws the cache away; all of the log will be computed anew."""
        self.close()
        self._open()

    def close(self) -> None:
        """Frees the cache; its pages still reach the store."""
        self.sequence.close()

    def _open(self) -> None:
        self.sequence = SequenceCache(self.method, self._originals, self._names(), self._wait)
        self._prompt_left = 0
        self.counted = {"exceptions": 0, "originals_missing": 0}

    def _names(self) -> PageNames:
        return PageNames(self._fingerprint, self.method.page_shape, self._salt, self.tokens)
