"""A session on this worker: its token log, and the cache of the tokens computed so far."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from blake3 import blake3

from qaq_core import Method, Originals, PageShape, SequenceCache, page_id
from qaq_core.storage import HostPages
from services.common.secret import derive_key
from services.worker.prefix import PrefixLoad
from services.worker.shadow import Shadow
from services.worker.traced import TracedOriginals

if TYPE_CHECKING:
    from opentelemetry.context import Context


def page_salt(secret: str, tenant: str) -> bytes:
    """The salt of a tenant's page ids: without the secret and the tenant's name nobody can compute them."""
    return blake3(tenant.encode(), key=derive_key(secret, "page ids")).digest()


class PageNames:
    """Ids of a token log's pages.

    Keys and values computed over full precision depend on the tokens alone. The id of such a page is a hash of its
    content and of the page before it, so every session with the same prefix finds it. Later keys and values were
    computed over a quantized cache: they depend on the preset, on the target, and on when exceptions were answered.
    The id of such a page contains a random number of this session, and only a session that was given the id finds it.

    Args:
        tokens: the log. It may grow, but the tokens of a named page may not change.
        exact_prefix: the number of tokens computed over full precision, see `SequenceCache.exact_prefix`.
    """

    def __init__(
        self,
        fingerprint: str,
        shape: PageShape,
        salt: bytes,
        tokens: Sequence[int],
        exact_prefix: Callable[[], int],
    ) -> None:
        self._fingerprint, self._shape, self._salt = fingerprint, shape, salt
        self._tokens, self._exact_prefix = tokens, exact_prefix
        self._private_salt = salt + secrets.token_bytes(16)
        self._shared: list[bytes] = []

    def __call__(self, index: int) -> bytes:
        """The id of page `index`, which has just been computed."""
        if (index + 1) * self._shape.tokens <= self._exact_prefix():
            return self.shared(index)
        return self._id(self._private_salt, index)

    def shared(self, index: int) -> bytes:
        """The content hash of page `index`, whose tokens must be in the log."""
        while len(self._shared) <= index:
            self._shared.append(self._id(self._salt, len(self._shared)))
        return self._shared[index]

    def _id(self, salt: bytes, index: int) -> bytes:
        size = self._shape.tokens
        tokens = self._tokens[index * size : (index + 1) * size]
        if len(tokens) < size:
            raise IndexError(f"page {index} is named before its tokens are known")
        parent = self.shared(index - 1) if index else b""
        return page_id(self._fingerprint, self._shape.dtype, salt, parent, tokens)


class Session:
    """A token log and its cache. The cache may lack the end of the log; it never holds more.

    Args:
        tokens: the log so far.
        wait: decode waits for re-quantized rows.
        host_pages: see `SequenceCache`.

    Attributes:
        names: ids of the log's pages.
        loading: the load of a stored prefix; nothing is computed before it ends.
        loaded: tokens whose keys and values came from the store.
        min_bytes: a lower bound on the bytes of a preempted session's cache; 0 otherwise.
        reported: pages whose ids the router knows, see `new_pages`.
        counted: counts of this cache that are in the metrics already, by name.
        floor: the least λ that somebody has set for this session alone.
        shadow: a full-precision cache of the same tokens, while somebody compares the two.
    """

    def __init__(
        self,
        method: Method,
        originals: Originals,
        fingerprint: str,
        tokens: Sequence[int],
        salt: bytes = b"",
        wait: bool = False,
        host_pages: HostPages | None = None,
    ) -> None:
        self.method = method
        self.tokens = list(tokens)
        self._originals, self._fingerprint, self._salt, self._wait = originals, fingerprint, salt, wait
        self._host_pages = host_pages
        self.floor = 0.0
        self.shadow: Shadow | None = None
        self._prefill_left = 0
        self._held_pages: list[bytes] = []
        self._resting: list[bytes] = []
        self.counted: dict[str, int]
        self.loading: PrefixLoad | None = None
        self._open()

    @property
    def uncached(self) -> int:
        """Tokens of the log that the cache does not hold yet."""
        return len(self.tokens) - self.sequence.length

    @property
    def fp16_bytes(self) -> int:
        """Bytes of the cached tokens at 16 bits per element."""
        shape = self.method.shape
        return self.sequence.length * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2

    @property
    def packed_elements(self) -> int:
        """Elements that are held as codes."""
        packed = self.sequence.packed
        return packed.layers * 2 * packed.heads * len(packed) * packed.head_dim

    @property
    def prefill_started(self) -> bool:
        """A part of a prompt is computed, and not all of it."""
        return self._prefill_left > 0

    @property
    def prefilling(self) -> bool:
        """The next forward pass is a chunk of a prompt, not one decoded token."""
        return self._prefill_left > 0 or self.uncached > 1 or self.sequence.length == 0

    @property
    def stored(self) -> bool:
        """The store has acknowledged every page."""
        staging = self.sequence.staging
        staging.collect()
        return staging.stored == len(staging.names)

    def follow(self, trace: Context | None) -> None:
        """Its calls of the store belong to another generation's trace."""
        if isinstance(self._originals, TracedOriginals):
            self._originals.trace = trace

    def continues_in(self, log: Sequence[int], method: Method) -> bool:
        """Whether the cache can be used to continue `log`: it holds a proper prefix of it."""
        cached = self.sequence.length
        usable = method is self.method and self._prefill_left == 0
        return usable and cached < len(log) and self.tokens[:cached] == list(log[:cached])

    def resume(self, log: Sequence[int]) -> None:
        """Continues with a log that `continues_in` accepted."""
        cached = self.sequence.length
        self.tokens[cached:] = log[cached:]
        if self.shadow is not None:
            self.shadow.cut(cached)
        self.loaded = self.reported = 0

    def load(self, page_ids: Sequence[bytes], recompute: int, timeout_s: float) -> None:
        """Requests the log's first pages from the store.

        Args:
            page_ids: ids of the first pages, as reported when they were stored; may be empty.
            recompute: last tokens of the log that are computed even if they are stored.
        """
        pages = (self.uncached - max(1, recompute)) // self.method.page_tokens
        if pages > 0:
            shared = [self.names.shared(index) for index in range(pages)]
            self.loading = PrefixLoad(self._originals, self.method.page_shape, shared, page_ids, timeout_s)

    def poll(self) -> None:
        """Begins the prompt with the loaded pages once the load has ended."""
        if self.loading is None or not self.loading.poll():
            return
        pages, shared = self.loading.take()
        self.loading = None
        if pages:
            self.loaded = len(pages) * self.method.page_tokens
            self._prefill_left = self.uncached - self.loaded
            self.sequence.load(pages, shared, self._prefill_left)

    def new_pages(self) -> tuple[int, list[bytes]]:
        """Index of the first page that was stored since the last call, and the ids from there on."""
        first, self.reported = self.reported, self.sequence.staging.stored
        return first, self.sequence.staging.names[first : self.reported]

    def next_chunk(self, limit: int) -> list[int]:
        """The next tokens to compute, at most `limit`. Announces a prompt to the cache when it begins."""
        self._release_pages()
        if self._prefill_left == 0 and self.prefilling:
            self._prefill_left = self.uncached
            self.sequence.expect_prompt(self.uncached)
        cached = self.sequence.length
        chunk = self.tokens[cached : cached + min(limit, self._prefill_left or 1)]
        self._prefill_left = max(0, self._prefill_left - len(chunk))
        return chunk

    def next_draft(self, draft: Sequence[int]) -> list[int]:
        """The next token to compute and a draft of those behind it, which is announced to the cache."""
        chunk = [*self.next_chunk(1), *draft]
        self.sequence.expect_draft(len(chunk))
        return chunk

    def fork(self) -> Session:
        """A session with the same log and a copy of the cache. The session must not be in prefill."""
        other = copy.copy(self)
        other.tokens, other._resting, other.shadow = list(self.tokens), [], None
        other.names = other._names()
        other.sequence = self.sequence.fork(other.names)
        other.counted = {}
        return other

    def preempt(self, min_bytes: int) -> None:
        """Frees the cache, whose pages are all stored, and holds the pages for `restore`. Counts continue.

        Args:
            min_bytes: see `Session.min_bytes`.
        """
        names, counts, counted = self.sequence.staging.names, self.sequence.requantizer.counts, self.counted
        self._originals.hold(names)
        self.reset()
        self._held_pages, self.min_bytes = names, min_bytes
        self.sequence.requantizer.counts, self.counted = counts, counted

    def restore(self, recompute: int, timeout_s: float) -> None:
        """Requests the pages of a preempted session from the store, see `load`."""
        self.load(self._held_pages, recompute, timeout_s)

    def reset(self) -> None:
        """Discards the cache. The whole log will be computed again."""
        self.close()
        self._open()

    def rest(self) -> None:
        """Lets the store drop the pages, while the session is idle, when it has no room for those of running ones."""
        self._resting = list(self.sequence.staging.names)
        self._originals.rest(self._resting)

    def wake(self) -> None:
        """Holds the pages that are still stored again."""
        if self._resting:
            self._originals.wake(self._resting)
            self._resting = []

    def close(self) -> None:
        """Frees the cache; its pages still reach the store."""
        self.wake()  # closing the sequence ends its hold
        if self.loading is not None:
            self.loading.close()
        self._release_pages()
        self.sequence.close()

    def _open(self) -> None:
        self.names = self._names()
        self.sequence = SequenceCache(self.method, self._originals, self.names, self._wait, self._host_pages)
        self.loading = None
        self.loaded = self.reported = self.min_bytes = self._prefill_left = 0
        self.counted = {}

    def _release_pages(self) -> None:
        """Releases the pages held during a preemption. The loaded ones are held by the cache itself."""
        if self._held_pages:
            self._originals.forget(self._held_pages)
            self._held_pages = []

    def _names(self) -> PageNames:
        return PageNames(
            self._fingerprint, self.method.page_shape, self._salt, self.tokens, lambda: self.sequence.exact_prefix
        )
