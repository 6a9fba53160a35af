"""The cache of one sequence: its forward passes, which are prompts, decode steps and drafts.

During prefill the residual window holds the whole prompt. When prefill ends, and in decode whenever the window is
full, the oldest tokens are packed: see `SequenceTokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from qaq_core.allocation.attention_statistics import Observer, PromptObserver
from qaq_core.attention.base import LayerInput
from qaq_core.attention.reference import LayerTokens
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import Page, unique_names
from qaq_core.cache.method import Method
from qaq_core.cache.tokens import SequenceTokens
from qaq_core.storage.host_pages import HostPages
from qaq_core.storage.originals import Originals


class SequenceCache(SequenceTokens):
    """The quantized cache of one sequence.

    Args and attributes are those of `SequenceTokens`, and beside them:

    Attributes:
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
        host_pages: HostPages | None = None,
    ) -> None:
        super().__init__(method, originals, page_name, wait, host_pages)
        self.drafted = 0
        self._expected = self._draft = 0
        self._first_prompt = True
        self._packs_later = self._unpacked = False

    # -- a forward pass, layer by layer ----------------------------------------------------------------

    def expect_prompt(self, tokens: int) -> None:
        """Announces a prompt, which may arrive in chunks. It stays in the residual window until its last token."""
        self._check_settled("begin another")
        self._begin_prompt(tokens)

    def pack_later(self) -> None:
        """Leaves the prompt that arrives now as it came until `pack_prompt`, or until what comes next needs it packed.

        Whoever waits for the token after a prompt gets it sooner: its logits do not depend on packing.
        """
        self._packs_later = True

    def pack_prompt(self) -> bool:
        """Packs the prompt that `pack_later` has left; False if there is none."""
        unpacked, self._unpacked = self._unpacked, False
        if unpacked:
            self._pack_prompt()
        return unpacked

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
        self._take_decoded(self.residual.end_step(tokens))
        self.importance.forget_queries()
        if self.in_time is not None:
            self.in_time.forget(refused=True)
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
        if (host_pages := self.staging.host_pages) is not None:
            for page in pages:
                host_pages.add(page)
        self.length = held
        self.exact_prefix = shared * self.method.page_tokens
        self._begin_prompt(coming)

    def attend(self, given: LayerInput) -> torch.Tensor:
        """Stores the keys and values of the next n tokens in a layer, and attends to all tokens so far.

        Returns:
            float32 [query_heads, n, head_dim].
        """
        if self._draft:
            return self._attend_draft(given)
        tokens, observer = self.take(given.layer, given.keys, given.values)
        out = self.method.attention(given.query, tokens, given.scaling, given.sliding_window, observer)
        if not self._expected:
            self.correct(0, given.layer, given.query[:, 0], given.scaling, out[:, 0])
        return out

    def correct(self, ahead: int, layer: int, query: torch.Tensor, scaling: float, out: torch.Tensor) -> None:
        """Corrects a layer's output of a query, `ahead` tokens behind the next one, for what it looked at.

        Args:
            query: [query_heads, head_dim].
            out: float32 [query_heads, head_dim]; changed in place.
        """
        position = self.length + ahead
        if self.in_time is not None and (sums := self.importance.log_sums.get(position)) is not None:
            self.in_time.correct(position, layer, query, scaling, sums[layer], out)

    @property
    def predicted_errors(self) -> list[float]:
        """Of each token of the last pass, if they were decoded with exceptions in time: the predicted KL in nats."""
        return [] if self.in_time is None else self.in_time.predicted

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
            self._take_decoded(fresh)
            return
        if self._first_prompt and self.exact_prefix == self.length:
            self.exact_prefix += fresh.shape[3]
        self.staging.append(fresh)
        self.length += fresh.shape[3]
        self._expected -= fresh.shape[3]
        if self._expected == 0:
            self._first_prompt = False
            self._unpacked, later, self._packs_later = True, self._packs_later, False
            if not later:
                self.pack_prompt()

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
        self.pack_prompt()
        if self.drafted:
            self.accept(min(self.drafted, max(0, length - self.length)))
        if length >= self.length:
            return
        self._crop(length)
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
        other._first_prompt = False
        self._copy_to(other, page_name or unique_names())
        return other

    # -- inside ----------------------------------------------------------------------------------------

    def _check_settled(self, what: str) -> None:
        if self._expected:
            raise ConfigError(f"prefill has not ended; {what} when the prompt is complete")
        if self._draft or self.drafted:
            raise ConfigError(f"a draft has not ended; {what} when its tokens are accepted or refused")
        self.pack_prompt()

    def _begin_step(self, n: int) -> None:
        self.pack_prompt()
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
        if self.in_time is not None:
            self.in_time.forget()
        if self._expected:
            return
        self.importance.begin_step(self.length, self.length + n, self._statistic_room, self.method.sinks)
        if self.in_time is not None:
            behind = self.length - self.method.sinks
            self.in_time.begin(self.importance, self.method.sinks, self.length, behind % self.method.policy.every == 0)

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
        for ahead in range(n):
            self.correct(ahead, layer, query[ahead, :, 0], given.scaling, out[ahead, :, 0])
        return out.squeeze(2).transpose(0, 1)

    def _begin_prompt(self, tokens: int) -> None:
        self._expected = tokens
        self.residual.begin_prompt(tokens)
        self.importance.begin_prompt(self.length + tokens, tokens)


def forks(sequences: Iterable[SequenceCache]) -> list[SequenceCache]:
    """A fork of each of them, or an error and none: those that were made before a failure are closed."""
    made: list[SequenceCache] = []
    try:
        for sequence in sequences:
            made.append(sequence.fork())
    except BaseException:
        for fork in made:
            fork.close()
        raise
    return made
