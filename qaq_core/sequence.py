"""One sequence's cache: exact sinks and recent tokens, packed tokens between them, originals behind them.

Tokens stand as [sinks | packed | recent]. While a prompt is computed all its tokens are exact; when it is
complete (or, in decode, when the recent window is full) the oldest are quantized in groups and packed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qaq_core.attention.reference import LayerTokens, Observer
from qaq_core.errors import ConfigError
from qaq_core.exact import ExactTokens
from qaq_core.exceptions import Exceptions
from qaq_core.method import Method
from qaq_core.originals import InProcessOriginals, Originals
from qaq_core.outliers import Outliers
from qaq_core.packed import PackedTokens
from qaq_core.pages import KEY, VALUE, Page
from qaq_core.policies import ErrorPolicy, View
from qaq_core.policies.base import solve_error, solve_price
from qaq_core.staging import Staging
from qaq_core.window import PromptWatch, Reduction

_UNLIMITED = 1 << 62
SETTLED = 512
"""A price found while decoding is found again until this many tokens are packed."""

STEERING = 2.0
"""Octaves that the price turns by for each bit an element over the target, once in `Policy.narrow_every` steps."""


@dataclass(frozen=True)
class CacheStatistics:
    """Measured state of one sequence's cache; bytes are those of allocated buffers."""

    tokens: int
    kv_bytes: int
    kv_bytes_fp16: int
    staging_bytes: int
    key_bits: dict[float, int]
    value_bits: dict[float, int]
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

    Attributes:
        price: what was found to meet the target; None until tokens are packed.
        floor: least price that is asked of this sequence, see `reprice`.
        allowance: bytes that it may still ask for to get back what a floor took from it; None for no limit.
        faithful: first tokens whose keys and values were computed over full precision alone: those of the
            first prompt. They depend on the tokens and nothing else; later ones on what was quantized, and when.
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
        self.faithful = 0
        self.price: float | None = None
        self.floor = 0.0
        self.allowance: int | None = None
        self.staging = Staging(method.page_shape, originals or InProcessOriginals(), page_name or _unique_names())
        shape = method.shape
        self.packed = PackedTokens(
            method.quantizer,
            (shape.layers, shape.kv_heads, shape.head_dim),
            method.sinks,
            method.device,
            method.kernel,
        )
        self.exceptions = Exceptions(self.packed, self.staging, method.policy, wait)
        self.exact = ExactTokens(
            (shape.layers, shape.kv_heads, shape.head_dim),
            method.sinks + 2 * method.group,
            method.dtype,
            method.window_dtype,
            method.device,
        )
        self._importance = self._importance_buffer(0)
        self._expected = 0
        self._watch: PromptWatch | None = None
        self._statistic: torch.Tensor | None = None
        self._steps = 0
        self._settling = False
        self._first_prompt = True
        self.recovering = False

    # -- what a forward pass does, layer by layer ------------------------------------------------------

    def expect(self, tokens: int) -> None:
        """The next tokens are a prompt that may come in chunks: keep them exact until the last has arrived."""
        if self._expected:
            raise ConfigError("a prompt is still arriving")
        self._begin_prompt(tokens)

    def load(self, pages: Sequence[Page], shared: int, coming: int) -> None:
        """Begins a prompt with stored pages in place of computing them; `coming` more tokens are computed.

        What the window predicts of all of them comes from the queries of those `coming` tokens.

        Args:
            pages: the prompt's first, in order, without a gap. The sequence must be empty.
            shared: so many of them, from the first, hold full-precision numbers, see `faithful`.
        """
        if self.length or self._expected:
            raise ConfigError("pages can only be loaded into an empty sequence")
        held = len(pages) * self.method.page_tokens
        self.exact.begin_prompt(held + coming)
        for page in pages:
            self.exact.load(page.data)
        self.staging.resume([page.id for page in pages])
        self.length = held
        self.faithful = shared * self.method.page_tokens
        self._begin_prompt(coming)

    @property
    def elastic(self) -> bool:
        """Whether it can give way to a price."""
        return self.method.policy.elastic

    @property
    def paid(self) -> float:
        """The price in force: its own, or the floor if that is higher."""
        own = self.method.policy.price if self.price is None else self.price
        return max(own, self.floor) if self.elastic else own

    def bits_at(self, floors: Sequence[float]) -> list[float]:
        """Code bits an element of the packed tokens that each floor would leave, see `reprice`."""
        policy, own = self.method.policy, self.method.policy.price if self.price is None else self.price
        demand = policy.demand(self._view())
        pairs = [policy.widths(demand, max(own, floor)) for floor in floors]
        return [float(keys.float().mean() + values.float().mean()) / 4 for keys, values in pairs]

    def reprice(self, floor: float) -> None:
        """Sets the least price of a bit, which sequences may share.

        If that is more than was paid, vectors give up what they would not pay for, at once and from what they
        hold. If it is less they get it back from their originals while decoding, within `allowance`.
        """
        before, self.floor = self.paid, floor
        if self.paid > before and len(self.packed):
            self.exceptions.settle(self._view(), self.paid)
        self.recovering = (self.elastic and self.paid < before) or (self.recovering and self.paid == before)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Takes the next n tokens' keys and values of a layer and attends to everything so far.

        Args:
            query: [query_heads, n, head_dim]. keys, values: [kv_heads, n, head_dim], after RoPE.
        Returns:
            float32 [query_heads, n, head_dim].
        """
        tokens, observe = self.take(layer, keys, values)
        return self.method.attention(query, tokens, scaling, sliding_window, observe)

    def take(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[LayerTokens, Observer | None]:
        """Takes the next tokens' keys and values of a layer; what to attend to, and who watches."""
        if layer == 0:
            self._begin_step(keys.shape[1])
        exact_keys, exact_values = self.exact.write(layer, keys, values)
        tokens = LayerTokens(
            layer,
            exact_keys,
            exact_values,
            min(self.method.sinks, exact_keys.shape[1]),
            self.packed if len(self.packed) else None,
        )
        return tokens, self._observer(layer)

    def adopt(self, originals: torch.Tensor, watch: PromptWatch) -> None:
        """Takes a prompt that was computed elsewhere, as if its forward pass had just ended.

        Args:
            originals: [layers, 2, kv_heads, n, head_dim], after RoPE, in the model's dtype.
            watch: has seen the prompt's probabilities.
        """
        self.expect(originals.shape[3])
        self._begin_step(originals.shape[3])
        self._watch = watch
        for layer, (keys, values) in enumerate(originals):
            self.exact.write(layer, keys, values)
        self.commit()

    def commit(self) -> None:
        """Ends a forward pass: originals leave, tokens are packed, exceptions are looked for."""
        fresh = self.exact.end_step()
        if self._first_prompt and self._expected and self.faithful == self.length:
            self.faithful += fresh.shape[3]
        self.staging.append(fresh)
        self.length += fresh.shape[3]
        if self._expected:
            self._expected -= fresh.shape[3]
            if self._expected == 0:
                self._end_prompt()
            return
        self.exceptions.apply()
        if self._statistic is not None:
            self.method.window.observe(self._importance, self._statistic, self.length - 1)
            self._statistic = None
        if self.exact.held - self.method.sinks >= 2 * self.method.group:
            self._pack(self.method.group)
        self._steps += 1
        policy = self.method.policy
        if policy.exceptions and len(self.packed) and self._steps % policy.every == 0:
            self._review(self._steps % policy.narrow_every == 0)

    def fork(self, page_name: Callable[[int], bytes] | None = None) -> SequenceCache:
        """A sequence that holds the same tokens and goes on by itself; its counts begin at 0.

        Its device memory is its own, its complete pages are shared.

        Args:
            page_name: as for a new sequence; asked for the pages that are not complete yet.
        Raises:
            ConfigError: a prompt is still arriving.
        """
        if self._expected:
            raise ConfigError("a prompt is still arriving; fork when it is complete")
        other = SequenceCache(self.method, self.staging.originals, wait=self.exceptions.wait)
        other.length, other.price = self.length, self.price
        other.floor, other.recovering = self.floor, self.recovering
        other.faithful, other._first_prompt = self.faithful, False
        other.staging = self.staging.fork(page_name or _unique_names())
        other.packed, other.exact = self.packed.copy(), self.exact.copy()
        other.exceptions = Exceptions(other.packed, other.staging, self.method.policy, self.exceptions.wait)
        other.exceptions.rounded_from = self.exceptions.rounded_from
        other._importance = self._importance.clone()
        other._steps, other._settling = self._steps, self._settling
        return other

    # -- measures --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Allocated bytes of every buffer this sequence holds on the device."""
        return self.exact.nbytes + self._importance.untyped_storage().nbytes() + self.packed.nbytes

    @property
    def staging_bytes(self) -> int:
        """Host bytes of originals that the store has not acknowledged."""
        return self.staging.nbytes

    def bits(self, side: int) -> torch.Tensor:
        """float32 [layers, kv_heads, length]: bits an element of each vector, by position; exact ones have 16."""
        shape, exact = self.method.shape, 8.0 * self.method.window_dtype.itemsize
        held = torch.full((shape.layers, shape.kv_heads, self.length), exact)
        if len(self.packed):
            held[:, :, self.packed.start : self.packed.stop] = self.packed.widths(side).cpu() / 2
        return held

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
        self.exact.close()
        self._importance = self._importance_buffer(0)
        self._watch = self._statistic = None
        self.packed = PackedTokens(self.method.quantizer, (0, 0, 0), 0, self.method.device)
        self.exceptions.close(self.packed)

    # -- inside ----------------------------------------------------------------------------------------

    def _steer(self) -> None:
        """Turns the price towards what the target asks for: bits drift while tokens come and attention moves."""
        target = self.method.target_bits(self.length, len(self.packed), self._fixed_bytes(0, (), ()))
        if target is None or self.method.target.error is not None or self.price is None:
            return
        held = sum(float(self.packed.widths(side).float().mean()) for side in (KEY, VALUE)) / 4
        self.price *= 2.0 ** (STEERING * (held - target))

    def _review(self, narrow: bool) -> None:
        if narrow:
            self._steer()
        view = self._view()
        if not self.recovering:
            self.exceptions.review(view, self.paid, narrow)
            return
        most = _UNLIMITED if self.allowance is None else self.allowance
        asked = self.exceptions.review(view, self.paid, narrow, most)
        if asked is None:
            self.recovering = False
        elif self.allowance is not None:
            self.allowance -= asked

    def _begin_step(self, n: int) -> None:
        if not self._expected and n > 1:
            self._begin_prompt(n)
        if self._expected and n > self._expected:
            raise ConfigError(f"a prompt of {self._expected} more tokens was announced, {n} came")
        self.exact.begin_step(n, prompt=self._expected > 0)
        if self._expected:
            return
        if self._steps % self.method.window.every == 0:
            shape = self.method.shape
            self._statistic = torch.empty(shape.layers, shape.kv_heads, self.length + n, device=self.method.device)
        if self._importance.shape[2] < self.length + n:
            base = self.packed.stop if len(self.packed) else self.length
            self._grow_importance(base + 2 * self.method.group)

    def _begin_prompt(self, tokens: int) -> None:
        self._expected = tokens
        self.exact.begin_prompt(tokens)
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
        self._first_prompt = False
        movable = self.exact.held - self.method.sinks
        groups = movable // self.method.group - 1
        if groups > 0:
            self._pack(groups * self.method.group, solve=True)
        self.exact.end_prompt()
        if self.method.dtype != self.method.window_dtype:
            # What is in the window now, and all that comes after, is packed from rounded numbers.
            self.exceptions.rounded_from = min(self.exceptions.rounded_from, self.packed.stop)

    def _observer(self, layer: int) -> Callable[[torch.Tensor, int], None] | None:
        watch, base = self._watch, self.length
        if watch is not None:
            return lambda probabilities, first: watch(layer, probabilities, base + first)
        if self._statistic is None:
            return None
        return Reduction(self.method.window.statistic, self._statistic[layer])

    def _pack(self, tokens: int, solve: bool = False) -> None:
        """Quantizes the oldest exact tokens after the sinks; finds the price anew if told to, or if it must."""
        method, sinks = self.method, self.method.sinks
        start = self.packed.stop
        moving = self.exact.slice(sinks, sinks + tokens)
        rows, metas, outliers = method.measure(moving, start)
        scales = tuple(method.quantizer.codec.affine(meta)[0] for meta in metas)
        importance = method.window.importance(self._importance[:, :, : self.length])
        view = View(importance, start, (scales[KEY], scales[VALUE]))
        if solve or self.price is None or (self._settling and len(self.packed) < SETTLED):
            self._settling = self._steps > 0 and not solve
            self.price = self._solve(view, self._fixed_bytes(tokens, metas, outliers))
        self.packed.append(method.policy.widths(method.policy.demand(view), self.paid), rows, metas, outliers)
        self.exact.drop(sinks, sinks + tokens)

    def _solve(self, coming: View, coming_bytes: int) -> float:
        """The price that meets the target with the tokens that are packed and those about to be."""
        method, view = self.method, coming
        if len(self.packed):
            held = self._view().scales
            scales = [torch.cat([old, new], 2) for old, new in zip(held, coming.scales, strict=True)]
            view = View(coming.importance, self.packed.start, (scales[KEY], scales[VALUE]))
        demand = method.policy.demand(view)
        if method.target.error is not None:
            assert isinstance(method.policy, ErrorPolicy)
            per_element = method.target.error / method.shape.head_dim
            return solve_error(method.policy, demand, per_element * self.length)
        target = method.target_bits(self.length, view.shape[2], coming_bytes)
        return method.policy.price if target is None else solve_price(method.policy, demand, target)

    def _fixed_bytes(
        self, tokens: int, metas: tuple[torch.Tensor, ...], outliers: tuple[Outliers | None, ...]
    ) -> int:
        """What the cache will hold besides codes once `tokens` are packed."""
        shape = self.method.shape
        tags = shape.layers * shape.kv_heads * (len(self.packed) + tokens)
        held = [part for side in self.packed.sides for part in (side.meta, side.outliers)]
        kept = sum(part.nbytes for part in (*held, *outliers) if part is not None)
        watched = self.length + 2 * self.method.group
        importance = shape.layers * shape.kv_heads * watched * self.method.window.bytes_per_token
        return self.exact.window_bytes + tags + sum(meta.numel() for meta in metas) + kept + importance

    def _view(self) -> View:
        affine = self.method.quantizer.codec.affine
        scales = [affine(side.meta)[0] for side in self.packed.sides]
        return View(
            self.method.window.importance(self._importance[:, :, : self.length]),
            self.packed.start,
            (scales[KEY], scales[VALUE]),
        )

    def _importance_buffer(self, tokens: int) -> torch.Tensor:
        shape = self.method.shape
        dims = (shape.layers, shape.kv_heads, tokens, self.method.window.bytes_per_token)
        return torch.zeros(dims, dtype=torch.uint8, device=self.method.device)

    def _grow_importance(self, tokens: int) -> None:
        grown = self._importance_buffer(tokens)
        grown[:, :, : self._importance.shape[2]] = self._importance
        self._importance = grown


def _unique_names() -> Callable[[int], bytes]:
    """Page ids that no other sequence has."""
    unique = uuid.uuid4().bytes
    return lambda index: unique + index.to_bytes(16, "little")
