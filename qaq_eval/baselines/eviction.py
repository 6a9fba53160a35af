"""Caches that evict: every head keeps the tokens that were attended to most, and the most recent ones, in
half precision.

What is evicted is gone for good. A rival says by which record of attention tokens are ranked, and how many
recent ones are safe. The budget is a share of the tokens seen so far, so that a cache is compressed equally at
any length; it is met after a prompt, and again after each decoded token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from qaq_core import Method, Originals, Quantizer, SequenceCache, Target
from qaq_core.allocation import AttentionStatistic, FixedPolicy, PromptObserver
from qaq_core.attention import LayerInput
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.statistics import CacheStatistics
from qaq_core.models import ModelShape
from qaq_core.quantization import GaussianCodec, IdentityTransform

QUERY_CHUNK = 256
FEWEST = 4
"""Tokens that are kept however short the sequence is."""


class Record(AttentionStatistic, Protocol):
    """A window whose importance ranks tokens. Its statistic of a step is the query group's mean probability,
    whatever `reduction` says to kernels: eviction attends by itself."""

    def join(self, held: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The state of tokens held before a prompt and what the prompt saw of them, both uint8 [..., bytes]."""
        ...


def parts(
    shape: ModelShape, target: Target, share: float | None, record: Record, recent: Callable[[int], int]
) -> dict[str, Any]:
    """What makes up an evicting method.

    Args:
        share: of tokens kept, over 0 and at most 1; None to meet the target.
        recent: how many of so many kept tokens are the most recent ones.
    """
    if (share is None) == (target.compression is None) or target.bits or target.error:
        raise ConfigError("eviction takes a share of tokens to keep (h2o-0.2) or a compression (h2o@8x)")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"the share of tokens to keep must be over 0 and at most 1, not {share}")
    return {
        "quantizer": Quantizer(IdentityTransform(), GaussianCodec()),
        "policy": FixedPolicy(16, 16),
        "statistic": record,
        "target": target,
        "sinks": 0,
        "share": share,
        "recent": recent,
        "kind": EvictingMethod,
    }


@dataclass(frozen=True, kw_only=True)
class EvictingMethod(Method):
    """A method whose sequences evict tokens instead of quantizing them; frame, codec and policy are not used.

    Attributes:
        share, recent: see `parts`.
    """

    share: float | None
    recent: Callable[[int], int]

    def sequence(
        self,
        originals: Originals | None = None,
        page_name: Callable[[int], bytes] | None = None,
        wait: bool = False,
    ) -> EvictingCache:
        return EvictingCache(self)

    def budget(self, length: int) -> int:
        """Tokens that each head keeps of so many."""
        if self.share is not None:
            keep = int(self.share * length)
        else:
            assert self.target.compression is not None
            shape = self.shape
            row = 2 * shape.head_dim * self.residual_dtype.itemsize + 4 + self.statistic.bytes_per_token
            plain = 2 * shape.head_dim * 2
            # One slot more is held, for the token that arrives.
            keep = int(length * plain / (self.target.compression * row)) - 1
        return min(length, max(FEWEST, keep))


class EvictingCache(SequenceCache):
    """One sequence's kept tokens, of every layer and head others, in slots of no order.

    Keys are kept after RoPE; positions are kept for masks and to know the recent ones.
    """

    batched = False

    def __init__(self, method: EvictingMethod) -> None:
        super().__init__(method)
        self._budget, self._recent = method.budget, method.recent
        self._record: Record = method.statistic  # type: ignore[assignment]
        self._held = self._incoming = self._prompt = 0
        self._new(0, method.residual_dtype)
        self._watch: PromptObserver | None = None
        self._seen: torch.Tensor | None = None

    # -- what a forward pass does ----------------------------------------------------------------------

    def expect_prompt(self, tokens: int) -> None:
        if self._expected:
            raise ConfigError("a prompt is still arriving")
        shape = self.method.shape
        self._expected = self._prompt = tokens
        self._resize(self._held + tokens, self.method.dtype)
        self._watch = self._record.prompt(
            shape.layers, shape.kv_heads, self.length + tokens, tokens, self.method.device
        )

    def attend(self, given: LayerInput) -> torch.Tensor:
        layer, query, keys, values, scaling, sliding_window = given
        if layer == 0:
            self._begin(keys.shape[1])
        stop = self._write(layer, keys, values)
        held_keys, held_values = self._rows[layer, :, :, :stop].float().unsqueeze(2)
        positions = self._positions[layer, :, None, None, :stop]
        grouped = query.float().unflatten(0, (keys.shape[0], -1)) * scaling
        outputs = []
        for first in range(0, query.shape[1], QUERY_CHUNK):
            part = grouped[:, :, first : first + QUERY_CHUNK]
            own = self.length + first + torch.arange(part.shape[2], device=query.device)[:, None]
            hidden = positions > own
            if sliding_window is not None:
                hidden |= positions <= own - sliding_window
            scores = part @ held_keys.mT
            probabilities = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            if self._watch is not None:
                self._watch(layer, probabilities, self.length + first)
            elif self._seen is not None:
                self._seen[layer] = probabilities[:, :, 0].mean(1)
            outputs.append((probabilities @ held_values).flatten(0, 1))
        return torch.cat(outputs, 1)

    def load_prefill(self, originals: torch.Tensor, watch: PromptObserver) -> None:
        self.expect_prompt(originals.shape[3])
        self._begin(originals.shape[3])
        self._watch = watch
        for layer, (keys, values) in enumerate(originals):
            self._write(layer, keys, values)
        self.commit()

    def commit(self) -> None:
        """Ends a forward pass: its tokens are ranked with the others, and the least are evicted."""
        self._held, self.length = self._held + self._incoming, self.length + self._incoming
        if self._expected:
            self._expected -= self._incoming
            if self._expected:
                return
            self._end_watch()
        elif self._seen is not None:
            self._record.update(self._state[:, :, : self._held], self._seen, self.length - 1)
            self._seen = None
        self._evict(self._budget(self.length))

    # -- measures --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return sum(held.untyped_storage().nbytes() for held in (self._rows, self._positions, self._state))

    @property
    def positions(self) -> torch.Tensor:
        """int32 [layers, kv_heads, kept], of the tokens that are kept, in no order."""
        return self._positions[:, :, : self._held]

    def bits(self, side: int) -> torch.Tensor:
        shape = self.method.shape
        held = torch.zeros(shape.layers, shape.kv_heads, self.length)
        return held.scatter_(2, self.positions.cpu().long(), 8 * self.method.residual_dtype.itemsize)

    def stats(self) -> CacheStatistics:
        heads = self.method.shape.layers * self.method.shape.kv_heads
        kept = 8 * self.method.residual_dtype.itemsize
        bits = {0.0: heads * (self.length - self._held), float(kept): heads * self._held}
        held = {width: count for width, count in bits.items() if count}
        return replace(super().stats(), key_bits=held, value_bits=dict(held))

    def close(self) -> None:
        super().close()
        self._held, self._watch, self._seen = 0, None, None
        self._new(0, self.method.residual_dtype)

    # -- inside ----------------------------------------------------------------------------------------

    def _begin(self, n: int) -> None:
        if not self._expected and n > 1:
            self.expect_prompt(n)
        if self._expected and n > self._expected:
            raise ConfigError(f"a prompt of {self._expected} more tokens was announced, {n} came")
        self._incoming, stop = n, self._held + n
        self._resize(stop, self._rows.dtype)
        self._positions[:, :, self._held : stop] = torch.arange(
            self.length, self.length + n, dtype=torch.int32, device=self.method.device
        )
        self._state[:, :, self._held : stop] = 0
        if not self._expected:
            self._seen = torch.empty(*self._positions.shape[:2], stop, device=self.method.device)

    def _write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> int:
        stop = self._held + self._incoming
        for side, new in ((KEY, keys), (VALUE, values)):
            self._rows[layer, side, :, self._held : stop] = new
        return stop

    def _end_watch(self) -> None:
        """What the prompt saw of its own tokens and of those held before it."""
        assert self._watch is not None
        seen, before = self._watch.state()[:, :, : self._held], self._held - self._prompt
        seen[:, :, :before] = self._record.join(self._state[:, :, :before], seen[:, :, :before])
        self._state[:, :, : self._held], self._watch, self._prompt = seen, None, 0

    def _evict(self, keep: int) -> None:
        """Keeps so many tokens of each head: the most recent, then those of most worth, of equals the later."""
        if self._held > keep:
            positions = self._positions[:, :, : self._held]
            worth = self._record.importance(self._state[:, :, : self._held]).double()
            worth += positions.double() * 2.0**-40
            worth.masked_fill_(positions >= self.length - self._recent(keep), float("inf"))
            kept = worth.topk(keep, sorted=False).indices
            old = self._rows, self._positions, self._state
            dim = self.method.shape.head_dim
            self._new(keep + 1, self.method.residual_dtype)
            self._rows[:, :, :, :keep] = old[0].gather(3, kept[:, None, :, :, None].expand(-1, 2, -1, -1, dim))
            self._positions[:, :, :keep] = old[1].gather(2, kept)
            self._state[:, :, :keep] = old[2].gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, old[2].shape[3]))
            self._held = keep
        elif self._rows.dtype != self.method.residual_dtype:
            self._resize(self._held + 1, self.method.residual_dtype)

    def _resize(self, slots: int, dtype: torch.dtype) -> None:
        """Makes room for so many tokens; never less than there is."""
        if self._rows.shape[3] >= slots and self._rows.dtype == dtype:
            return
        held, old = self._held, (self._rows, self._positions, self._state)
        self._new(slots, dtype)
        self._rows[:, :, :, :held] = old[0][:, :, :, :held]
        self._positions[:, :, :held] = old[1][:, :, :held]
        self._state[:, :, :held] = old[2][:, :, :held]

    def _new(self, slots: int, dtype: torch.dtype) -> None:
        """Empty buffers: rows [layers, 2, kv_heads, slots, head_dim]; positions and state by slot too."""
        shape, device = self.method.shape, self.method.device
        dims = (shape.layers, shape.kv_heads, slots)
        self._rows = torch.empty(shape.layers, 2, *dims[1:], shape.head_dim, dtype=dtype, device=device)
        self._positions = torch.zeros(dims, dtype=torch.int32, device=device)
        self._state = torch.zeros(*dims, self.method.statistic.bytes_per_token, dtype=torch.uint8, device=device)
