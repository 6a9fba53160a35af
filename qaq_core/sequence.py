"""One sequence's cache: exact sinks and recent tokens, packed tokens between them, originals behind them.

Tokens stand as [sinks | packed | recent]. While a prompt is computed all its tokens are exact; when it is
complete (or, in decode, when the recent window is full) the oldest are quantized in groups and packed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qaq_core.attention.reference import LayerTokens
from qaq_core.errors import ConfigError
from qaq_core.exceptions import Exceptions
from qaq_core.method import Method
from qaq_core.originals import InProcessOriginals, Originals
from qaq_core.outliers import Outliers
from qaq_core.packed import PackedTokens
from qaq_core.pages import KEY, VALUE
from qaq_core.policies import View
from qaq_core.policies.base import solve_price
from qaq_core.staging import Staging
from qaq_core.window import PromptWatch

GROUP = 16
"""Tokens leave the recent window this many at a time, and this many always stay."""

SETTLED = 512
"""A price found while decoding is found again until this many tokens are packed."""


@dataclass(frozen=True)
class CacheStatistics:
    """Measured state of one sequence's cache; bytes are those of allocated buffers."""

    tokens: int
    kv_bytes: int
    kv_bytes_fp16: int
    staging_bytes: int
    key_bits: dict[int, int]
    value_bits: dict[int, int]
    exceptions: int
    rows_requantized: int
    requantize_bytes: int
    rows_narrowed: int
    originals_missing: int

    @property
    def compression(self) -> float:
        """fp16 bytes over resident bytes."""
        return self.kv_bytes_fp16 / self.kv_bytes if self.kv_bytes else 1.0


class SequenceCache:
    """The quantized cache of one sequence.

    Args:
        method: what all sequences of a model share.
        originals: store for full-precision pages; this process's memory if not given.
        page_name: gives the id of page i, called when its tokens are complete; random names if not given.
        wait: block a step until re-quantized rows have arrived.
    """

    def __init__(
        self,
        method: Method,
        originals: Originals | None = None,
        page_name: Callable[[int], bytes] | None = None,
        wait: bool = False,
    ) -> None:
        self.method = method
        self.length = 0
        self.price: float | None = None
        unique = uuid.uuid4().bytes
        name = page_name or (lambda index: unique + index.to_bytes(16, "little"))
        self.staging = Staging(method.page_shape, originals or InProcessOriginals(), name)
        shape = method.shape
        self.packed = PackedTokens(
            method.quantizer, (shape.layers, shape.kv_heads, shape.head_dim), method.sinks, method.device
        )
        self.exceptions = Exceptions(self.packed, self.staging, method.policy, wait)
        self._exact = self._buffer(0, method.window_dtype)
        self._importance = self._importance_buffer(0)
        self._expected = 0
        self._arriving = 0
        self._watch: PromptWatch | None = None
        self._statistic: torch.Tensor | None = None
        self._steps = 0
        self._settling = False

    # -- what a forward pass does, layer by layer ------------------------------------------------------

    def expect(self, tokens: int) -> None:
        """The next tokens are a prompt that may come in chunks: keep them exact until the last has arrived."""
        if self._expected:
            raise ConfigError("a prompt is still arriving")
        self._begin_prompt(tokens)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Stores the next n tokens' keys and values of a layer and attends to everything so far.

        Args:
            query: [query_heads, n, head_dim]. keys, values: [kv_heads, n, head_dim], after RoPE.
        Returns:
            float32 [query_heads, n, head_dim].
        """
        n = keys.shape[1]
        if layer == 0:
            self._begin_step(n)
        held = self._exact_tokens
        self._exact[layer, KEY, :, held : held + n] = keys
        self._exact[layer, VALUE, :, held : held + n] = values
        tokens = LayerTokens(
            layer,
            self._exact[layer, KEY, :, : held + n],
            self._exact[layer, VALUE, :, : held + n],
            min(self.method.sinks, held + n),
            self.packed if len(self.packed) else None,
        )
        return self.method.attention(query, tokens, scaling, sliding_window, self._observer(layer))

    def commit(self) -> None:
        """Ends a forward pass: originals leave, tokens are packed, exceptions are looked for."""
        n, held = self._arriving, self._exact_tokens
        self.staging.append(self._original(self._exact[:, :, :, held : held + n]))
        self.length += n
        self._arriving = 0
        if self._expected:
            self._expected -= n
            if self._expected == 0:
                self._end_prompt()
            return
        self.exceptions.apply()
        if self._statistic is not None:
            self.method.window.observe(self._importance, self._statistic, self._steps)
            self._statistic = None
        if self._exact_tokens - self.method.sinks >= 2 * GROUP:
            self._pack(GROUP)
        self._steps += 1
        policy = self.method.policy
        if policy.exceptions and len(self.packed) and self._steps % policy.every == 0:
            assert self.price is not None
            # Giving bits back is not urgent, and each time re-packs blocks.
            self.exceptions.review(self._view(), self.price, narrow=self._steps % GROUP == 0)

    # -- measures --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Allocated bytes of every buffer this sequence holds on the device."""
        own = self._exact.untyped_storage().nbytes() + self._importance.untyped_storage().nbytes()
        return own + self.packed.nbytes

    @property
    def staging_bytes(self) -> int:
        """Host bytes of originals that the store has not acknowledged."""
        return self.staging.nbytes

    def stats(self) -> CacheStatistics:
        shape, counts = self.method.shape, self.exceptions.counts
        return CacheStatistics(
            tokens=self.length,
            kv_bytes=self.nbytes,
            kv_bytes_fp16=self.length * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2,
            staging_bytes=self.staging_bytes,
            key_bits=self.packed.histogram(KEY),
            value_bits=self.packed.histogram(VALUE),
            exceptions=counts.exceptions,
            rows_requantized=counts.rows_requantized,
            requantize_bytes=counts.requantize_bytes,
            rows_narrowed=counts.rows_narrowed,
            originals_missing=counts.originals_missing,
        )

    def close(self) -> None:
        """Frees everything; pages under way still reach the store."""
        self.staging.close()
        self._exact = self._buffer(0, self.method.window_dtype)
        self._importance = self._importance_buffer(0)
        self._watch = self._statistic = None
        self.packed = PackedTokens(self.method.quantizer, (0, 0, 0), 0, self.method.device)
        self.exceptions.close(self.packed)

    # -- inside ----------------------------------------------------------------------------------------

    @property
    def _exact_tokens(self) -> int:
        return self.length - len(self.packed)

    def _begin_step(self, n: int) -> None:
        if not self._expected and n > 1:
            self._begin_prompt(n)
        if self._expected and n > self._expected:
            raise ConfigError(f"a prompt of {self._expected} more tokens was announced, {n} came")
        self._arriving = n
        if self._expected:
            return
        if self._exact.shape[3] < self._exact_tokens + n:
            self._grow_exact(self.method.sinks + 2 * GROUP, self.method.window_dtype)
        if self.method.policy.exceptions and self._steps % self.method.window.every == 0:
            layers, heads = self._exact.shape[0], self._exact.shape[2]
            self._statistic = torch.empty(layers, heads, self.length + n, device=self.method.device)
        if self._importance.shape[2] < self.length + n:
            self._grow_importance(self.packed.stop + 2 * GROUP if len(self.packed) else self.length + 2 * GROUP)

    def _begin_prompt(self, tokens: int) -> None:
        self._expected = tokens
        self._grow_exact(self._exact_tokens + tokens, self.method.dtype)
        shape = self.method.shape
        self._watch = self.method.window.prompt(
            shape.layers, shape.kv_heads, self.length + tokens, tokens, self.method.device
        )

    def _end_prompt(self) -> None:
        assert self._watch is not None
        seen = self._watch.state()
        held = self._importance[:, :, : seen.shape[2]]
        # Earlier turns' tokens keep what they were worth if this prompt did not look at them.
        seen[:, :, : held.shape[2]] = torch.maximum(seen[:, :, : held.shape[2]], held)
        self._importance, self._watch = seen, None
        movable = self._exact_tokens - self.method.sinks
        groups = (movable - GROUP) // GROUP
        if groups > 0:
            self._pack(groups * GROUP)
        self._grow_exact(max(self._exact_tokens, self.method.sinks + 2 * GROUP), self.method.window_dtype)

    def _observer(self, layer: int) -> Callable[[torch.Tensor, int], None] | None:
        watch, base = self._watch, self.length
        if watch is not None:
            return lambda probabilities, first: watch(layer, probabilities, base + first)
        statistic = self._statistic
        if statistic is None:
            return None

        def reduce(probabilities: torch.Tensor, first: int) -> None:
            statistic[layer] = self.method.window.reduce(probabilities)

        return reduce

    def _original(self, exact: torch.Tensor) -> torch.Tensor:
        """What counts as the original: in the window's dtype, in which tokens are held until they are packed.

        Stored and packed rows come of the same numbers, so planes that arrive later fit those that are held.
        """
        return exact.to(self.method.window_dtype)

    def _pack(self, tokens: int) -> None:
        """Quantizes the oldest exact tokens after the sinks."""
        method, sinks = self.method, self.method.sinks
        start = self.packed.stop
        moving = self._original(self._exact[:, :, :, sinks : sinks + tokens])
        rows, metas, outliers = method.measure(moving, start)
        scales = tuple(method.quantizer.codec.affine(meta)[0] for meta in metas)
        importance = method.window.importance(self._importance[:, :, : self.length])
        view = View(importance, start, (scales[KEY], scales[VALUE]))
        if self.price is None or (self._settling and len(self.packed) < SETTLED):
            self._settling = self._steps > 0
            self.price = self._solve(view, self._fixed_bytes(tokens, metas, outliers))
        self.packed.append(method.policy.widths(method.policy.demand(view), self.price), rows, metas, outliers)
        kept = torch.cat([self._exact[:, :, :, :sinks], self._exact[:, :, :, sinks + tokens :]], 3)
        self._exact = kept if self._expected else self._trimmed(kept)

    def _solve(self, coming: View, coming_bytes: int) -> float:
        """The price that meets the target with the tokens that are packed and those about to be."""
        method, view = self.method, coming
        if len(self.packed):
            held = self._view().scales
            scales = [torch.cat([old, new], 2) for old, new in zip(held, coming.scales, strict=True)]
            view = View(coming.importance, self.packed.start, (scales[KEY], scales[VALUE]))
        target = method.target_bits(self.length, view.shape[2], coming_bytes)
        if target is None:
            return method.policy.price
        return solve_price(method.policy, method.policy.demand(view), target)

    def _trimmed(self, exact: torch.Tensor) -> torch.Tensor:
        """The exact tokens in a buffer of the recent window's size, in the window's dtype."""
        buffer = self._buffer(self.method.sinks + 2 * GROUP, self.method.window_dtype)
        held = min(exact.shape[3], self._exact_tokens)
        if held > buffer.shape[3]:
            return exact
        buffer[:, :, :, :held] = exact[:, :, :, :held]
        return buffer

    def _fixed_bytes(
        self, tokens: int, metas: tuple[torch.Tensor, ...], outliers: tuple[Outliers | None, ...]
    ) -> int:
        """What the cache will hold besides codes once `tokens` are packed."""
        shape = self.method.shape
        exact = self._buffer_bytes(self.method.sinks + 2 * GROUP, self.method.window_dtype)
        tags = shape.layers * shape.kv_heads * (len(self.packed) + tokens)
        held = [part for side in self.packed.sides for part in (side.meta, side.outliers)]
        kept = sum(part.nbytes for part in (*held, *outliers) if part is not None)
        importance = shape.layers * shape.kv_heads * (self.length + 2 * GROUP) * self.method.window.bytes_per_token
        return exact + tags + sum(meta.numel() for meta in metas) + kept + importance

    def _view(self) -> View:
        affine = self.method.quantizer.codec.affine
        scales = [affine(side.meta)[0] for side in self.packed.sides]
        return View(
            self.method.window.importance(self._importance[:, :, : self.length]),
            self.packed.start,
            (scales[KEY], scales[VALUE]),
        )

    def _buffer(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        shape = self.method.shape
        dims = (shape.layers, 2, shape.kv_heads, tokens, shape.head_dim)
        return torch.empty(dims, dtype=dtype, device=self.method.device)

    def _buffer_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        shape = self.method.shape
        return shape.layers * 2 * shape.kv_heads * tokens * shape.head_dim * dtype.itemsize

    def _grow_exact(self, tokens: int, dtype: torch.dtype) -> None:
        if self._exact.shape[3] >= tokens and self._exact.dtype == dtype:
            return
        held = self._exact_tokens
        grown = self._buffer(max(tokens, held), dtype)
        grown[:, :, :, :held] = self._exact[:, :, :, :held]
        self._exact = grown

    def _importance_buffer(self, tokens: int) -> torch.Tensor:
        shape = self.method.shape
        dims = (shape.layers, shape.kv_heads, tokens, self.method.window.bytes_per_token)
        return torch.zeros(dims, dtype=torch.uint8, device=self.method.device)

    def _grow_importance(self, tokens: int) -> None:
        grown = self._importance_buffer(tokens)
        grown[:, :, : self._importance.shape[2]] = self._importance
        self._importance = grown
