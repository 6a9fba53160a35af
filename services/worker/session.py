"""A session on this worker: its token log and the cache of all of the log that was computed."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Sequence

from blake3 import blake3

from qaq_core import Method, Originals, PageShape, SequenceCache, page_id
from services.worker.prefix import PrefixLoad


def page_salt(secret: str, tenant: str) -> bytes:
    """What a tenant's page ids hold, so that no other tenant finds them, nor anybody without the secret."""
    return blake3(tenant.encode(), key=blake3(secret.encode()).digest()).digest()


class PageNames:
    """Ids of a token log's pages.

    Keys and values that were computed over full precision depend on the tokens alone: such a page has a name that
    follows from its content, chained to the page before, and whoever has the same prefix finds it. What came later
    was computed over a quantized cache, whose bits depend on the preset, the target and on when exceptions were
    answered: such a page has a name that nobody else can make, and is found by who was told it.

    Args:
        tokens: the log; it may grow, but no page that was named may change.
        exact_prefix: how many tokens of it were computed over full precision, see `SequenceCache.exact_prefix`.
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
        self._tokens, self._faithful = tokens, exact_prefix
        self._own_salt = salt + secrets.token_bytes(16)
        self._shared: list[bytes] = []

    def __call__(self, index: int) -> bytes:
        """The name of page `index`, which has just been computed."""
        if (index + 1) * self._shape.tokens <= self._faithful():
            return self.shared(index)
        return self._id(self._own_salt, index)

    def shared(self, index: int) -> bytes:
        """The name that follows from the content of page `index`, whose tokens must all be known."""
        while len(self._shared) <= index:
            self._shared.append(self._id(self._salt, len(self._shared)))
        return self._shared[index]

    def _id(self, salt: bytes, index: int) -> bytes:
        size = self._shape.tokens
        own = self._tokens[index * size : (index + 1) * size]
        if len(own) < size:
            raise IndexError(f"page {index} is named before its tokens are known")
        parent = self.shared(index - 1) if index else b""
        return page_id(self._fingerprint, self._shape.dtype, salt, parent, own)


class Session:
    """Tokens and their cache. The cache may lack the end of the log; it never holds more.

    Args:
        tokens: the log so far.
        wait: decode waits for re-quantized rows.

    Attributes:
        names: of the log's pages.
        loading: stored pages are on their way; nothing can be computed before they are here.
        loaded: tokens whose keys and values came from the store.
        needs: bytes that the cache must have at least, as far as is known from before it was freed.
        told: pages that whoever runs the session was told of, see `fresh_pages`.
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
        self._held: list[bytes] = []
        self.counted: dict[str, int]
        self.loading: PrefixLoad | None = None
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
    def packed_elements(self) -> int:
        """Numbers that are held in codes."""
        packed = self.sequence.packed
        return packed.layers * 2 * packed.heads * len(packed) * packed.head_dim

    @property
    def begun(self) -> bool:
        """A prompt is under way."""
        return self._prompt_left > 0

    @property
    def prefilling(self) -> bool:
        """The next forward pass is a chunk of a prompt and not one decoded token."""
        return self._prompt_left > 0 or self.lacking > 1

    @property
    def stored(self) -> bool:
        """The store has acknowledged every page."""
        staging = self.sequence.staging
        staging.collect()
        return staging.stored == len(staging.names)

    def continues_in(self, log: Sequence[int], method: Method) -> bool:
        """True if the cache can be used to continue `log`: it holds a part of it and not all."""
        held = self.sequence.length
        same = method is self.method and self._prompt_left == 0
        return same and held < len(log) and self.tokens[:held] == list(log[:held])

    def resume(self, log: Sequence[int]) -> None:
        """Takes a log that `continues_in` agreed to."""
        held = self.sequence.length
        self.tokens[held:] = log[held:]
        self.loaded = self.told = 0

    def load(self, known: Sequence[bytes], rest: int, patience_s: float) -> None:
        """Asks the store for the log's first pages. All but the last `rest` tokens may come from there.

        Args:
            known: names of the first pages, as they were told when they were stored; may be empty.
        """
        most = (self.lacking - max(1, rest)) // self.method.page_tokens
        if most > 0:
            shared = [self.names.shared(index) for index in range(most)]
            self.loading = PrefixLoad(self._originals, self.method.page_shape, shared, known, patience_s)

    def poll(self) -> None:
        """Begins the prompt with the pages that were loaded, once they are here."""
        if self.loading is None or not self.loading.poll():
            return
        pages, shared = self.loading.take()
        self.loading = None
        if pages:
            self.loaded = len(pages) * self.method.page_tokens
            self._prompt_left = self.lacking - self.loaded
            self.sequence.load(pages, shared, self._prompt_left)

    def fresh_pages(self) -> tuple[int, list[bytes]]:
        """Names of pages that the store has now and that were not told yet, and the index of the first."""
        first, self.told = self.told, self.sequence.staging.stored
        return first, self.sequence.staging.names[first : self.told]

    def next_chunk(self, limit: int) -> list[int]:
        """The next tokens to compute, at most `limit`; the cache is told when a prompt begins."""
        self._let_go()
        if self._prompt_left == 0 and self.lacking > 1:
            self._prompt_left = self.lacking
            self.sequence.expect_prompt(self.lacking)
        held = self.sequence.length
        chunk = self.tokens[held : held + min(limit, self._prompt_left or 1)]
        self._prompt_left = max(0, self._prompt_left - len(chunk))
        return chunk

    def fork(self) -> Session:
        """A session with the same log and a copy of the cache, where no prompt may be arriving."""
        other = copy.copy(self)
        other.tokens = list(self.tokens)
        other.names = other._names()
        other.sequence = self.sequence.fork(other.names)
        other.counted = {"exceptions": 0, "originals_missing": 0}
        return other

    def pause(self, needs: int) -> None:
        """Frees the cache, whose pages are stored. They are held for `restore`; the counts go on.

        Args:
            needs: bytes that the cache has at the least bits.
        """
        names, counts, counted = self.sequence.staging.names, self.sequence.requantizer.counts, self.counted
        self._originals.hold(names)
        self.rebuild()
        self._held, self.needs = names, needs
        self.sequence.requantizer.counts, self.counted = counts, counted

    def restore(self, rest: int, patience_s: float) -> None:
        """After a pause: asks the store for the pages, see `load`."""
        self.load(self._held, rest, patience_s)

    def rebuild(self) -> None:
        """Throws the cache away; all of the log will be computed anew."""
        self.close()
        self._open()

    def close(self) -> None:
        """Frees the cache; its pages still reach the store."""
        if self.loading is not None:
            self.loading.close()
        self._let_go()
        self.sequence.close()

    def _open(self) -> None:
        self.names = self._names()
        self.sequence = SequenceCache(self.method, self._originals, self.names, self._wait)
        self.loading = None
        self.loaded = self.told = self.needs = self._prompt_left = 0
        self.counted = {"exceptions": 0, "originals_missing": 0}

    def _let_go(self) -> None:
        """Forgets the pages that were held through a pause; those that were loaded are held by themselves."""
        if self._held:
            self._originals.forget(self._held)
            self._held = []

    def _names(self) -> PageNames:
        return PageNames(
            self._fingerprint, self.method.page_shape, self._salt, self.tokens, lambda: self.sequence.exact_prefix
        )
