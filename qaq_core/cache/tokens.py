"""The tokens of one sequence: the residual window, packed tokens, and the originals behind them.

Tokens are ordered as [sinks | packed | recent]. The residual window holds sinks and recent tokens; whenever it is
full, the oldest tokens are quantized and packed.

Packing, reviews and observed queries come at positions, every so many tokens behind the sinks, so that what happens
does not depend on how many tokens a pass computed or on what was cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qaq_core.allocation.allocator import TokenState
from qaq_core.allocation.importance import Importance
from qaq_core.allocation.rate_control import RateControl
from qaq_core.allocation.requantize import Requantizer
from qaq_core.base.pages import KEY, VALUE, unique_names
from qaq_core.base.statistics import CacheStatistics
from qaq_core.cache.method import Method
from qaq_core.quantization.outliers import Outliers
from qaq_core.storage.host_pages import HostPages
from qaq_core.storage.originals import InProcessOriginals, Originals
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.residual import ResidualWindow
from qaq_core.storage.staging import Staging


class SequenceTokens:
    """What `SequenceCache` holds between forward passes.

    Args:
        method: what all sequences of a model share.
        originals: store of full-precision pages; this process's memory if not given.
        page_name: returns the id of page i, see `Staging`; random ids if not given.
        wait: a decode step waits until re-quantized rows have arrived.
        host_pages: where pages stay that the store has taken, so that their rows are at hand.

    Attributes:
        rate: finds and steers λ.
        importance: the attention that the tokens have had.
        in_time: corrects decode steps for what they look at; None without exceptions in time.
        exact_prefix: number of first tokens whose keys and values were computed over a full-precision cache: those
            of the first prompt. They depend on the token ids alone; later ones depend on what was quantized.
    """

    def __init__(
        self,
        method: Method,
        originals: Originals | None = None,
        page_name: Callable[[int], bytes] | None = None,
        wait: bool = False,
        host_pages: HostPages | None = None,
    ) -> None:
        self.method = method
        self.length = 0
        self.exact_prefix = 0
        shape = method.shape
        elements = 2 * shape.layers * shape.kv_heads * shape.head_dim
        self.rate = RateControl(method.allocator, method.target, elements, shape.head_dim)
        query_heads = None if method.in_time is None else shape.query_heads
        self.importance = Importance(method.allocator, (shape.layers, shape.kv_heads), method.device, query_heads)
        names, store = page_name or unique_names(), originals or InProcessOriginals()
        self.staging = Staging(method.page_shape, store, names, host_pages)
        dims = (shape.layers, shape.kv_heads, shape.head_dim)
        self.packed = PackedTokens(method.quantizer, dims, method.sinks, method.device, method.repacker)
        self.requantizer = Requantizer(self.packed, self.staging, method.allocator, wait)
        self.in_time = method.exceptions_in_time(self.requantizer)
        room = method.sinks + 2 * method.pack_tokens
        self.residual = ResidualWindow(dims, room, method.dtype, method.residual_dtype, method.device)

    def bits_at(self, floor: float) -> float:
        """Code bits per element of the packed tokens at a floor, see `set_lambda_floor`."""
        return self.rate.bits_at(floor, self.packed_state())

    def set_lambda_floor(self, floor: float) -> None:
        """Sets the least λ, which sequences may share.

        If λ rises, rows are narrowed at once. If it falls, rows are widened from their originals during decode, within
        `RateControl.allowance`.
        """
        if self.rate.set_floor(floor) and len(self.packed):
            self.requantizer.narrow_to(self.packed_state(), self.rate.value)

    def recover(self) -> None:
        """Applies what was fetched, and goes on getting back what a floor took, as decode does; between two turns."""
        self.requantizer.apply()
        if self.rate.recovering and len(self.packed):
            self._review(narrow=False)

    def packed_state(self) -> TokenState:
        """The state of the packed tokens."""
        return TokenState(self.importance.state[:, :, : self.length], self.packed.start, self.packed.metas)

    # -- measures --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Allocated bytes of every buffer this sequence holds on the device."""
        return self.residual.nbytes + self.importance.nbytes + self.packed.nbytes

    @property
    def staging_bytes(self) -> int:
        """Host bytes of originals that the store has not acknowledged."""
        return self.staging.nbytes

    def bits(self, side: int) -> torch.Tensor:
        """Bits per element of each vector, float32 [layers, kv_heads, length]; 16 in the residual window."""
        shape, residual = self.method.shape, 8.0 * self.method.residual_dtype.itemsize
        held = torch.full((shape.layers, shape.kv_heads, self.length), residual)
        if len(self.packed):
            held[:, :, self.packed.start : self.packed.stop] = self.packed.widths(side).cpu() / 2
        return held

    def stats(self) -> CacheStatistics:
        shape, counts = self.method.shape, self.requantizer.counts
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
            rows_corrected=counts.rows_corrected,
            corrections_late=counts.corrections_late,
        )

    def close(self) -> None:
        """Frees all memory; pages being stored still reach the store."""
        self.staging.close()
        self.residual.close()
        self.importance.close()
        self.packed = PackedTokens(self.method.quantizer, (0, 0, 0), 0, self.method.device)
        self.requantizer.close(self.packed)
        if self.in_time is not None:
            self.in_time.close()

    # -- packing and cropping --------------------------------------------------------------------------

    def _take_decoded(self, fresh: torch.Tensor) -> None:
        """Takes in decoded tokens: originals [layers, 2, kv_heads, n, head_dim], which are in the window."""
        method, policy = self.method, self.method.policy
        self.staging.append(fresh)
        self._note_rounding()
        for position in range(self.length, self.length + fresh.shape[3]):
            self.length = position + 1
            self.requantizer.apply()
            self.importance.end_step(position)
            if self.in_time is not None:
                self.in_time.end(position)
            if self.length - self.packed.stop >= 2 * method.pack_tokens:
                self._pack(method.pack_tokens)
            behind = self.length - method.sinks
            if policy.exceptions and len(self.packed) and behind % policy.every == 0:
                self._review(behind % policy.narrow_every == 0)

    def _pack_prompt(self) -> None:
        """Packs what a prompt that has ended leaves in the window, but the most recent tokens."""
        self.importance.end_prompt()
        if self.in_time is not None:
            self.in_time.renew()
        movable = self.residual.held - self.method.sinks
        groups = movable // self.method.pack_tokens - 1
        if groups > 0:
            self._pack(groups * self.method.pack_tokens, solve=True)
        self.residual.end_prompt()
        self._note_rounding()

    def _crop(self, length: int) -> None:
        """Removes the tokens from position `length` on; see `SequenceCache.crop`."""
        sinks, packed, group = self.method.sinks, self.packed, self.method.pack_tokens
        stop = min(packed.stop, sinks + max(0, (length - sinks) // group - 1) * group)
        recent_again = self.staging.read(stop, min(length, packed.stop))
        self.staging.crop(length)
        self.residual.truncate(min(length, sinks) + max(0, length - packed.stop))
        self.residual.insert(sinks, recent_again)
        if stop < packed.stop:
            packed.crop(stop - packed.start)
            self.requantizer.crop(stop)
            if not len(packed):
                packed.quantizer = self.method.quantizer
                self.rate.restart()
        self.importance.crop(length)
        if self.in_time is not None:
            self.in_time.crop(stop)
        self.length, self.exact_prefix = length, min(self.exact_prefix, length)

    def _copy_to(self, other: SequenceTokens, page_name: Callable[[int], bytes]) -> None:
        """Gives another sequence copies of all that this one holds; see `SequenceCache.fork`."""
        other.length, other.rate, other.importance = self.length, self.rate.fork(), self.importance.copy()
        other.exact_prefix = self.exact_prefix
        other.packed, other.residual = self.packed.copy(), self.residual.copy()
        other.staging = self.staging.fork(page_name)  # the last: it holds pages, which a failure would leave held
        other.requantizer = Requantizer(other.packed, other.staging, self.method.allocator, self.requantizer.wait)
        other.requantizer.rounded_from = self.requantizer.rounded_from
        if self.in_time is not None:
            other.in_time = self.in_time.fork(other.requantizer)

    def _note_rounding(self) -> None:
        """Tokens in the window now, and all later ones, are packed from rounded numbers, if the window rounds."""
        if self.method.dtype != self.method.residual_dtype:
            self.requantizer.rounded_from = min(self.requantizer.rounded_from, self.packed.stop)

    def _pack(self, tokens: int, solve: bool = False) -> None:
        """Quantizes the oldest tokens of the residual window, behind the sinks; `solve` finds λ again."""
        method, packed, sinks = self.method, self.packed, self.method.sinks
        originals = self.residual.take_for_packing(sinks, sinks + tokens)
        if method.adaptation is not None and not len(packed):
            packed.quantizer = method.adaptation(method.quantizer, originals, packed.stop)
        rows, metas, outliers = method.prepare(packed.quantizer, originals, packed.stop, overwrite=True)
        new = TokenState(self.importance.state[:, :, : self.length], packed.stop, metas)
        if solve or self.rate.unsolved(len(packed)):
            everything = new.preceded(packed.start, packed.metas) if len(packed) else new
            self.rate.solve(everything, self.length, self._fixed_bytes(tokens, (*metas, *outliers)))
            self.rate.settling = not solve
        packed.append(self.rate.widths(new), rows, metas, outliers)
        self.residual.drop(sinks, sinks + tokens)

    def _review(self, narrow: bool) -> None:
        if narrow:
            self.rate.steer(self.packed, self.length, self._fixed_bytes())
        self.rate.charge(self.requantizer.review(self.packed_state(), self.rate.value, narrow, self.rate.most_bytes))

    def _fixed_bytes(self, tokens: int = 0, parts: Sequence[torch.Tensor | Outliers | None] = ()) -> int:
        """Bytes that the cache will hold besides codes.

        Args:
            tokens: number of tokens about to be packed; `parts` are their meta bytes and outliers.
        """
        tags = self.method.shape.layers * self.method.shape.kv_heads * tokens
        new = tags + sum(part.nbytes for part in parts if part is not None)
        statistic = self.importance.bytes_of(self.length + 2 * self.method.pack_tokens)
        return self.residual.residual_bytes + self.packed.fixed_bytes + new + statistic

    @property
    def _statistic_room(self) -> int:
        """Tokens that the attention statistic has room for in decode."""
        return (self.packed.stop if len(self.packed) else self.length) + 2 * self.method.pack_tokens
