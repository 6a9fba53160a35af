"""The cache of one sequence: the residual window, packed tokens, and the originals behind them.

Tokens are ordered as [sinks | packed | recent]. The residual window holds sinks and recent tokens. During prefill it
holds the whole prompt. When prefill ends, and in decode whenever the window is full, the oldest tokens are quantized
and packed.

Packing, reviews and observed queries come at positions, every so many tokens behind the sinks, so that what happens
does not depend on how many tokens a pass computed or on what was cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qaq_core.allocation.allocator import TokenState
from qaq_core.allocation.attention_statistics import Observer, PromptObserver
from qaq_core.allocation.importance import Importance
from qaq_core.allocation.rate_control import RateControl
from qaq_core.allocation.requantize import Requantizer
from qaq_core.attention.base import LayerInput
from qaq_core.attention.reference import LayerTokens
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE, Page, unique_names
from qaq_core.base.statistics import CacheStatistics
from qaq_core.cache.method import Method
from qaq_core.quantization.outliers import Outliers
from qaq_core.storage.originals import InProcessOriginals, Originals
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.residual import ResidualWindow
from qaq_core.storage.staging import Staging


class SequenceCache:
    """The quantized cache of one sequence.

    Args:
        method: what all sequences of a model share.
        originals: store of full-precision pages; this process's memory if not given.
        page_name: returns the id of page i, see `Staging`; random ids if not given.
        wait: a decode step waits until re-quantized rows have arrived.

    Attributes:
        rate: finds and steers λ.
        importance: the attention that the tokens have had.
        exact_prefix: number of first tokens whose keys and values were computed over a full-precision cache: those
            of the first prompt. They depend on the token ids alone; later ones depend on what was quantized.
        drafted: tokens of a draft that is computed and neither accepted nor refused, see `expect_draft`. They are not
            part of `length`.
    """

    batched = True
    """Decode steps of sequences of one method are computed together."""
    croppable = True
    """Tokens can be taken off the end: `crop` and `expect_draft`."""

    def __init__(
        self,
        method: Method,
        originals: Originals | None = None,
        page_name: Callable[[int], bytes] | None = None,
        wait: bool = False,
    ) -> None:
        self.method = method
        self.length = 0
        self.exact_prefix = 0
        shape = method.shape
        elements = 2 * shape.layers * shape.kv_heads * shape.head_dim
        self.rate = RateControl(method.allocator, method.target, elements, shape.head_dim)
        self.importance = Importance(method.allocator, (shape.layers, shape.kv_heads), method.device)
        self.staging = Staging(method.page_shape, originals or InProcessOriginals(), page_name or unique_names())
        dims = (shape.layers, shape.kv_heads, shape.head_dim)
        self.packed = PackedTokens(method.quantizer, dims, method.sinks, method.device, method.repacker)
        self.requantizer = Requantizer(self.packed, self.staging, method.allocator, wait)
        room = method.sinks + 2 * method.pack_tokens
        self.residual = ResidualWindow(dims, room, method.dtype, method.residual_dtype, method.device)
        self.drafted = 0
        self._expected = self._draft = 0
        self._first_prompt = True

    # -- a forward pass, layer by layer ----------------------------------------------------------------

    def expect_prompt(self, tokens: int) -> None:
        """Announces a prompt, which may arrive in chunks. It stays in the residual window until its last token."""
        self._check_settled("begin another")
        self._begin_prompt(tokens)

    def expect_draft(self, tokens: int) -> None:
        """Announces a draft: the next pass computes `tokens` tokens as that many decode steps, and then waits.

        Every query sees what it would see in decode. `accept` says how many of the tokens count. Until then nothing
        is staged, packed or reviewed, so refused tokens leave nothing behind. The result is that of decode if the
        draft is at most `draft_room` long. In a longer one, tokens are packed and reviewed later than in decode.

        Raises:
            ConfigError: a prompt or another draft has not ended.
        """
        self._check_settled("draft")
        if tokens < 1:
            raise ConfigError(f"a draft has at least 1 token, not {tokens}")
        self._draft = tokens

    @property
    def drafting(self) -> bool:
        """Whether a draft is announced, and not computed yet."""
        return self._draft > 0

    @property
    def draft_room(self) -> int:
        """Tokens until the cache next packs or reviews tokens, which a draft may have and still be exactly decode."""
        method = self.method
        room = self.packed.stop + 2 * method.pack_tokens - self.length
        if method.policy.exceptions:
            room = min(room, method.policy.every - (self.length - method.sinks) % method.policy.every)
        return room

    def accept(self, tokens: int) -> None:
        """Ends a draft: its first `tokens` tokens stay, the others were never there.

        Raises:
            ConfigError: no draft was computed, or it has fewer tokens.
        """
        if not 0 <= tokens <= self.drafted or not self.drafted:
            raise ConfigError(f"{tokens} tokens cannot be accepted: the draft that was computed has {self.drafted}")
        self.drafted = 0
        self._end_steps(self.residual.end_step(tokens))
        self.importance.observed.clear()
        self.importance.crop(max(self.length, self._statistic_room))
        self.residual.truncate(self.residual.held)

    def load(self, pages: Sequence[Page], shared: int, coming: int) -> None:
        """Begins a prompt with stored pages; the `coming` tokens after them are computed.

        The attention statistic of all of them comes from the queries of the `coming` tokens.

        Args:
            pages: the first pages of the prompt, in order, without a gap. The sequence must be empty.
            shared: number of first pages that hold full-precision numbers, see `exact_prefix`.
        """
        if self.length or self._expected:
            raise ConfigError("pages can only be loaded into an empty sequence")
        held = len(pages) * self.method.page_tokens
        self.residual.begin_prompt(held + coming)
        for page in pages:
            self.residual.load(page.data)
        self.staging.resume([page.id for page in pages])
        self.length = held
        self.exact_prefix = shared * self.method.page_tokens
        self._begin_prompt(coming)

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

    def attend(self, given: LayerInput) -> torch.Tensor:
        """Stores the keys and values of the next n tokens in a layer, and attends to all tokens so far.

        Returns:
            float32 [query_heads, n, head_dim].
        """
        if self._draft:
            return self._attend_draft(given)
        tokens, observer = self.take(given.layer, given.keys, given.values)
        return self.method.attention(given.query, tokens, given.scaling, given.sliding_window, observer)

    @property
    def prefilling(self) -> bool:
        """Whether a prompt is not complete yet."""
        return self._expected > 0

    def begin(self, tokens: int = 1) -> None:
        """Begins a decode step, or a draft: the keys and values of its tokens will be written to `residual`."""
        self._begin_step(tokens)

    def take(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[LayerTokens, Observer | None]:
        """Stores the keys and values of the next tokens in a layer; returns what to attend to, and the observer."""
        if layer == 0:
            self._begin_step(keys.shape[1])
        return self._tokens(layer, *self.residual.write(layer, keys, values)), self.importance.observer(
            layer, self.length
        )

    def load_prefill(self, originals: torch.Tensor, observer: PromptObserver) -> None:
        """Takes the keys and values of a prompt that was computed elsewhere, as if its forward pass had just ended.

        Args:
            originals: [layers, 2, kv_heads, n, head_dim], after RoPE, in the model's dtype.
            observer: has seen the prompt's attention probabilities.
        """
        self.expect_prompt(originals.shape[3])
        self._begin_step(originals.shape[3])
        self.importance.prompt = observer
        for layer, (keys, values) in enumerate(originals):
            self.residual.write(layer, keys, values)
        self.commit()

    def commit(self) -> None:
        """Ends a forward pass: stages originals, packs tokens, looks for attention-window exceptions."""
        if self._draft:
            self.drafted, self._draft = self._draft, 0
            return
        fresh = self.residual.end_step()
        if not self._expected:
            self._end_steps(fresh)
            return
        if self._first_prompt and self.exact_prefix == self.length:
            self.exact_prefix += fresh.shape[3]
        self.staging.append(fresh)
        self.length += fresh.shape[3]
        self._expected -= fresh.shape[3]
        if self._expected == 0:
            self._end_prompt()

    def crop(self, length: int) -> None:
        """Removes the tokens from position `length` on, those of a draft included.

        The attention that they paid to others stays in the statistic; nothing else of them does. Packed tokens that
        become recent again come back from their originals, so that at least `pack_tokens` are recent.

        Raises:
            ConfigError: prefill has not ended, or the length is negative.
            OriginalsError: the store failed or has lost an original that is needed. Nothing has changed then.
        """
        if self._expected or self._draft or length < 0:
            reason = f"a length of {length} is negative" if length < 0 else "a forward pass has not ended"
            raise ConfigError(f"the sequence cannot be cropped: {reason}")
        if self.drafted:
            self.accept(min(self.drafted, max(0, length - self.length)))
        if length >= self.length:
            return
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
        self.length, self.exact_prefix = length, min(self.exact_prefix, length)
        self._first_prompt |= length == 0

    def fork(self, page_name: Callable[[int], bytes] | None = None) -> SequenceCache:
        """An independent sequence with the same tokens; its counters start at 0.

        Device memory is copied; complete pages of originals are shared.

        Args:
            page_name: as for a new sequence; called for pages that are not complete yet.
        Raises:
            ConfigError: a prompt or a draft has not ended.
        """
        self._check_settled("fork")
        other = SequenceCache(self.method, self.staging.originals, wait=self.requantizer.wait)
        other.length, other.rate, other.importance = self.length, self.rate.fork(), self.importance.copy()
        other.exact_prefix, other._first_prompt = self.exact_prefix, False
        other.staging = self.staging.fork(page_name or unique_names())
        other.packed, other.residual = self.packed.copy(), self.residual.copy()
        other.requantizer = Requantizer(other.packed, other.staging, self.method.allocator, self.requantizer.wait)
        other.requantizer.rounded_from = self.requantizer.rounded_from
        return other

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
        )

    def close(self) -> None:
        """Frees all memory; pages being stored still reach the store."""
        self.staging.close()
        self.residual.close()
        self.importance.close()
        self.packed = PackedTokens(self.method.quantizer, (0, 0, 0), 0, self.method.device)
        self.requantizer.close(self.packed)

    # -- inside ----------------------------------------------------------------------------------------

    def _check_settled(self, what: str) -> None:
        if self._expected:
            raise ConfigError(f"prefill has not ended; {what} when the prompt is complete")
        if self._draft or self.drafted:
            raise ConfigError(f"a draft has not ended; {what} when its tokens are accepted or refused")

    def _begin_step(self, n: int) -> None:
        if self.drafted or self._draft not in (0, n):
            raise ConfigError(
                f"{n} tokens arrived, but a draft of {self.drafted or self._draft} tokens was "
                + ("computed: say with `accept` how many of them count" if self.drafted else "announced")
            )
        if not self._expected and not self._draft and n > 1:
            self._begin_prompt(n)
        if self._expected and n > self._expected:
            raise ConfigError(f"a prompt of {self._expected} more tokens was announced, but {n} arrived")
        self.residual.begin_step(n, prompt=self._expected > 0)
        if self._expected:
            return
        self.importance.begin_step(self.length, self.length + n, self._statistic_room, self.method.sinks)

    @property
    def _statistic_room(self) -> int:
        """Tokens that the attention statistic has room for in decode."""
        return (self.packed.stop if len(self.packed) else self.length) + 2 * self.method.pack_tokens

    def _tokens(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> LayerTokens:
        """What a query attends to: the residual window [kv_heads, n, head_dim], and the packed tokens."""
        sinks = min(self.method.sinks, keys.shape[1])
        return LayerTokens(layer, keys, values, sinks, self.packed if len(self.packed) else None)

    def _attend_draft(self, given: LayerInput) -> torch.Tensor:
        """Each query over the tokens up to its own, as if they had been decoded one by one."""
        layer, n = given.layer, given.keys.shape[1]
        if layer == 0:
            self._begin_step(n)
        keys, values = self.residual.write(layer, given.keys, given.values)
        stops = range(keys.shape[1] - n + 1, keys.shape[1] + 1)
        tokens = [self._tokens(layer, keys[:, :stop], values[:, :stop]) for stop in stops]
        observers = [self.importance.observer(layer, self.length + i) for i in range(n)]
        query = given.query.transpose(0, 1).unsqueeze(2)
        out = self.method.attention.batch(query, tokens, given.scaling, given.sliding_window, observers)
        return out.squeeze(2).transpose(0, 1)

    def _end_steps(self, fresh: torch.Tensor) -> None:
        """Takes in decoded tokens: originals [layers, 2, kv_heads, n, head_dim], which are in the window."""
        method, policy = self.method, self.method.policy
        self.staging.append(fresh)
        self._note_rounding()
        for position in range(self.length, self.length + fresh.shape[3]):
            self.length = position + 1
            self.requantizer.apply()
            self.importance.end_step(position)
            if self.length - self.packed.stop >= 2 * method.pack_tokens:
                self._pack(method.pack_tokens)
            behind = self.length - method.sinks
            if policy.exceptions and len(self.packed) and behind % policy.every == 0:
                self._review(behind % policy.narrow_every == 0)

    def _begin_prompt(self, tokens: int) -> None:
        self._expected = tokens
        self.residual.begin_prompt(tokens)
        self.importance.begin_prompt(self.length + tokens, tokens)

    def _end_prompt(self) -> None:
        self.importance.end_prompt()
        self._first_prompt = False
        movable = self.residual.held - self.method.sinks
        groups = movable // self.method.pack_tokens - 1
        if groups > 0:
            self._pack(groups * self.method.pack_tokens, solve=True)
        self.residual.end_prompt()
        self._note_rounding()

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

    def packed_state(self) -> TokenState:
        """The state of the packed tokens."""
        return TokenState(self.importance.state[:, :, : self.length], self.packed.start, self.packed.metas)

    def _fixed_bytes(self, tokens: int = 0, parts: Sequence[torch.Tensor | Outliers | None] = ()) -> int:
        """Bytes that the cache will hold besides codes.

        Args:
            tokens: number of tokens about to be packed; `parts` are their meta bytes and outliers.
        """
        tags = self.method.shape.layers * self.method.shape.kv_heads * tokens
        new = tags + sum(part.nbytes for part in parts if part is not None)
        statistic = self.importance.bytes_of(self.length + 2 * self.method.pack_tokens)
        return self.residual.residual_bytes + self.packed.fixed_bytes + new + statistic
