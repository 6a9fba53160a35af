"""Caches that evict: every head keeps the tokens with the highest scores, and the most recent ones, in half precision.

An evicted token is lost. A baseline says by which attention statistic tokens are scored and how many recent tokens are
always kept. The budget is a share of the tokens so far, so that the compression is the same at any length. It is
enforced after a prompt and after each decoded token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from qaq_core import Method, Originals, Quantizer, SequenceCache, Target
from qaq_core.allocation import AttentionStatistic, FixedPolicy, PromptObserver
from qaq_core.attention import LayerInput
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.statistics import CacheStatistics
from qaq_core.quantization import GaussianCodec, IdentityTransform

QUERY_CHUNK = 256
MIN_TOKENS = 4
"""Tokens that are kept however short the sequence is."""


class EvictionScore(AttentionStatistic, Protocol):
    """An attention statistic whose importance ranks tokens.

    `update` gets the query group's mean probability: eviction computes attention itself, and `reduction`, which is for
    kernels, does not apply.
    """

    def merge(self, before: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """The state of tokens held before a prompt, merged with the prompt's state of them; uint8 [..., bytes]."""
        ...


def preset(target: Target, share: float | None, score: EvictionScore, recent: Callable[[int], int]) -> dict[str, Any]:
    """The arguments of an evicting `Method`. Its transform, codec and policy are not used.

    Args:
        share: share of tokens kept, over 0 and at most 1; None to meet the target.
        recent: how many of the kept tokens are the most recent ones.
    """
    if (share is None) == (target.compression is None) or target.bits or target.error:
        raise ConfigError("eviction takes a share of tokens to keep (h2o-0.2) or a compression (h2o@8x)")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"the share of tokens to keep must be over 0 and at most 1, not {share}")
    return {
        "quantizer": Quantizer(IdentityTransform(), GaussianCodec()),
        "policy": FixedPolicy(16, 16),
        "statistic": score,
        "target": target,
        "sinks": 0,
        "new_sequence": partial(EvictingCache, share=share, recent=recent),
    }


class EvictingCache(SequenceCache):
    """The kept tokens of one sequence, for every layer and head, in slots without order.

    Keys are kept after RoPE. Positions are kept for masks and to find the recent tokens.

    Args:
        share, recent: see `preset`.
    """

    batched = croppable = False

    def __init__(
        self,
        method: Method,
        originals: Originals | None = None,
        page_name: Callable[[int], bytes] | None = None,
        wait: bool = False,
        *,
        share: float | None,
        recent: Callable[[int], int],
    ) -> None:
        super().__init__(method)
        self._share, self._recent = share, recent
        self._score: EvictionScore = method.statistic  # type: ignore[assignment]
        self._kept = self._incoming = self._prompt_tokens = 0
        self._allocate(0, method.residual_dtype)
        self._observer: PromptObserver | None = None
        self._probabilities: torch.Tensor | None = None

    def budget(self, length: int) -> int:
        """Tokens that each head keeps of a sequence of `length` tokens."""
        if self._share is not None:
            keep = int(self._share * length)
        else:
            method, compression = self.method, self.method.target.compression
            assert compression is not None
            token = 2 * method.shape.head_dim * method.residual_dtype.itemsize + 4 + method.statistic.bytes_per_token
            token_fp16 = 2 * method.shape.head_dim * 2
            # One more slot is allocated, for the next token.
            keep = int(length * token_fp16 / (compression * token)) - 1
        return min(length, max(MIN_TOKENS, keep))

    # -- a forward pass --------------------------------------------------------------------------------

    def expect_prompt(self, tokens: int) -> None:
        if self._expected:
            raise ConfigError("a prompt is still arriving")
        shape = self.method.shape
        self._expected = self._prompt_tokens = tokens
        self._resize(self._kept + tokens, self.method.dtype)
        self._observer = self._score.prompt(
            shape.layers, shape.kv_heads, self.length + tokens, tokens, self.method.device
        )

    def attend(self, given: LayerInput) -> torch.Tensor:
        layer, query, keys, values, scaling, sliding_window = given
        if layer == 0:
            self._begin(keys.shape[1])
        stop = self._write(layer, keys, values)
        all_keys, all_values = self._rows[layer, :, :, :stop].float().unsqueeze(2)
        positions = self._positions[layer, :, None, None, :stop]
        grouped = query.float().unflatten(0, (keys.shape[0], -1)) * scaling
        outputs = []
        for first in range(0, query.shape[1], QUERY_CHUNK):
            part = grouped[:, :, first : first + QUERY_CHUNK]
            query_positions = self.length + first + torch.arange(part.shape[2], device=query.device)[:, None]
            masked = positions > query_positions
            if sliding_window is not None:
                masked |= positions <= query_positions - sliding_window
            scores = part @ all_keys.mT
            probabilities = scores.masked_fill_(masked, float("-inf")).softmax(-1)
            if self._observer is not None:
                self._observer(layer, probabilities, self.length + first)
            elif self._probabilities is not None:
                self._probabilities[layer] = probabilities[:, :, 0].mean(1)
            outputs.append((probabilities @ all_values).flatten(0, 1))
        return torch.cat(outputs, 1)

    def load_prefill(self, originals: torch.Tensor, observer: PromptObserver) -> None:
        self.expect_prompt(originals.shape[3])
        self._begin(originals.shape[3])
        self._observer = observer
        for layer, (keys, values) in enumerate(originals):
            self._write(layer, keys, values)
        self.commit()

    def commit(self) -> None:
        """Ends a forward pass: scores its tokens and evicts those with the lowest scores."""
        self._kept, self.length = self._kept + self._incoming, self.length + self._incoming
        if self._expected:
            self._expected -= self._incoming
            if self._expected:
                return
            self._end_prompt_scores()
        elif self._probabilities is not None:
            self._score.update(self._state[:, :, : self._kept], self._probabilities, self.length - 1)
            self._probabilities = None
        self._evict(self.budget(self.length))

    def expect_draft(self, tokens: int) -> None:
        raise ConfigError("a cache that evicts tokens cannot refuse some again: those they drove out are lost")

    def crop(self, length: int) -> None:
        if length < self.length:
            raise ConfigError("a cache that evicts tokens cannot be cropped: what the last ones drove out is lost")

    def fork(self, page_name: Callable[[int], bytes] | None = None) -> SequenceCache:
        raise ConfigError("a cache that evicts tokens cannot be forked, so it serves neither beams nor several choices")

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return sum(buffer.untyped_storage().nbytes() for buffer in (self._rows, self._positions, self._state))

    @property
    def positions(self) -> torch.Tensor:
        """int32 [layers, kv_heads, kept], positions of the kept tokens, in no order."""
        return self._positions[:, :, : self._kept]

    def bits(self, side: int) -> torch.Tensor:
        shape = self.method.shape
        bits = torch.zeros(shape.layers, shape.kv_heads, self.length)
        return bits.scatter_(2, self.positions.cpu().long(), 8 * self.method.residual_dtype.itemsize)

    def stats(self) -> CacheStatistics:
        heads = self.method.shape.layers * self.method.shape.kv_heads
        width = float(8 * self.method.residual_dtype.itemsize)
        counts = {0.0: heads * (self.length - self._kept), width: heads * self._kept}
        histogram = {bits: vectors for bits, vectors in counts.items() if vectors}
        return replace(super().stats(), key_bits=histogram, value_bits=dict(histogram))

    def close(self) -> None:
        super().close()
        self._kept, self._observer, self._probabilities = 0, None, None
        self._allocate(0, self.method.residual_dtype)

    # -- inside ----------------------------------------------------------------------------------------

    def _begin(self, n: int) -> None:
        if not self._expected and n > 1:
            self.expect_prompt(n)
        if self._expected and n > self._expected:
            raise ConfigError(f"a prompt of {self._expected} more tokens was announced, {n} came")
        self._incoming, stop = n, self._kept + n
        self._resize(stop, self._rows.dtype)
        self._positions[:, :, self._kept : stop] = torch.arange(
            self.length, self.length + n, dtype=torch.int32, device=self.method.device
        )
        self._state[:, :, self._kept : stop] = 0
        if not self._expected:
            self._probabilities = torch.empty(*self._positions.shape[:2], stop, device=self.method.device)

    def _write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Writes new tokens behind the kept ones; returns the number of slots in use."""
        stop = self._kept + self._incoming
        for side, new in ((KEY, keys), (VALUE, values)):
            self._rows[layer, side, :, self._kept : stop] = new
        return stop

    def _end_prompt_scores(self) -> None:
        """Takes over the prompt's scores of its own tokens, merged with the scores of tokens held before."""
        assert self._observer is not None
        scores, before = self._observer.state()[:, :, : self._kept], self._kept - self._prompt_tokens
        scores[:, :, :before] = self._score.merge(self._state[:, :, :before], scores[:, :, :before])
        self._state[:, :, : self._kept], self._observer, self._prompt_tokens = scores, None, 0

    def _evict(self, keep: int) -> None:
        """Keeps `keep` tokens of each head: the recent ones, then those with the highest scores, later ones first."""
        if self._kept > keep:
            positions = self._positions[:, :, : self._kept]
            score = self._score.importance(self._state[:, :, : self._kept]).double()
            score += positions.double() * 2.0**-40
            score.masked_fill_(positions >= self.length - self._recent(keep), float("inf"))
            kept = score.topk(keep, sorted=False).indices
            rows, all_positions, state = self._rows, self._positions, self._state
            dim = self.method.shape.head_dim
            self._allocate(keep + 1, self.method.residual_dtype)
            self._rows[:, :, :, :keep] = rows.gather(3, kept[:, None, :, :, None].expand(-1, 2, -1, -1, dim))
            self._positions[:, :, :keep] = all_positions.gather(2, kept)
            self._state[:, :, :keep] = state.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, state.shape[3]))
            self._kept = keep
        elif self._rows.dtype != self.method.residual_dtype:
            self._resize(self._kept + 1, self.method.residual_dtype)

    def _resize(self, slots: int, dtype: torch.dtype) -> None:
        """Grows the buffers to at least `slots` slots and converts them to `dtype`."""
        if self._rows.shape[3] >= slots and self._rows.dtype == dtype:
            return
        kept, rows, positions, state = self._kept, self._rows, self._positions, self._state
        self._allocate(slots, dtype)
        self._rows[:, :, :, :kept] = rows[:, :, :, :kept]
        self._positions[:, :, :kept] = positions[:, :, :kept]
        self._state[:, :, :kept] = state[:, :, :kept]

    def _allocate(self, slots: int, dtype: torch.dtype) -> None:
        """Empty buffers: rows [layers, 2, kv_heads, slots, head_dim], positions and score states of each slot."""
        shape, device = self.method.shape, self.method.device
        dims = (shape.layers, shape.kv_heads, slots)
        self._rows = torch.empty(shape.layers, 2, *dims[1:], shape.head_dim, dtype=dtype, device=device)
        self._positions = torch.zeros(dims, dtype=torch.int32, device=device)
        self._state = torch.zeros(*dims, self.method.statistic.bytes_per_token, dtype=torch.uint8, device=device)
