"""A full-precision cache beside a session's: it gets the same tokens, and the distributions of both are compared."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import DynamicCache

CHUNK = 64
"""Tokens that are computed in one pass, at most: streams wait for it."""
TOGETHER = 8
"""Tokens that come one by one wait until so many are computed in one pass, which takes little longer than for one."""
HELD = 64
"""Distributions of the quantized cache that wait for those of full precision; older ones are not compared."""
TOLD = 256
"""Last compared tokens that are told one by one."""
MOST_KL = 100.0
"""Nats that are told of a distribution without a distance: one that is no number, or gives nothing to what may come."""
RECENT = 32
"""Last compared tokens of which a mean is told: what the cache loses now."""


@dataclass(frozen=True)
class Compared:
    """One generated token.

    Attributes:
        position: in the session's text.
        kl: nats that the quantized cache's distribution is away from that of full precision, KL(full || quantized).
        same_top: both have the same most likely token.
    """

    position: int
    kl: float
    same_top: bool


class Shadow:
    """Used by the scheduler's thread alone.

    Args:
        model: whose weights and linear layers are those of the worker. Its attention is transformers' own.

    Attributes:
        compared: the last tokens of which both distributions were known.
        count, agreed: all compared tokens, and those with the same most likely token.
        kl_sum, kl_max: over all compared tokens, in nats.
        missed: tokens that came too fast to be compared.
        keeps_up: it has all tokens but those that wait for more.
        failed: what went wrong, or "". Nothing is compared from then on; the session itself goes on.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._computed: list[int] = []
        self._quantized: dict[int, torch.Tensor] = {}
        self._full: dict[int, torch.Tensor] = {}
        self.compared: deque[Compared] = deque(maxlen=TOLD)
        self.count = self.agreed = self.missed = 0
        self.kl_sum = self.kl_max = 0.0
        self.keeps_up, self.failed = False, ""

    @property
    def length(self) -> int:
        """Tokens in the full-precision cache."""
        return len(self._computed)

    @property
    def nbytes(self) -> int:
        """Bytes of the full-precision cache."""
        layers = (layer for layer in self._cache.layers if layer.is_initialized)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def note(self, position: int, logits: torch.Tensor) -> None:
        """Takes what the quantized cache says of a token, before it is sampled.

        Args:
            logits: float [vocabulary].
        """
        if self.failed:
            return
        try:
            self._quantized[position] = logits.float().log_softmax(-1)
            if len(self._quantized) > HELD:
                del self._quantized[next(iter(self._quantized))]
                self.missed += 1
            self._compare(position)
        except Exception as error:  # memory may be full
            self.failed = str(error) or type(error).__name__

    def cut(self, tokens: int) -> None:
        """The session's text goes on in another way after so many tokens."""
        self._quantized = {at: row for at, row in self._quantized.items() if at <= tokens}
        self._full = {at: row for at, row in self._full.items() if at <= tokens}

    def step(self, tokens: Sequence[int], flush: bool) -> int:
        """Computes the next tokens of the session's text, and compares what is known of them.

        Args:
            flush: no more come soon. Else a few wait for more.
        Returns:
            how many were computed; 0 if it keeps up.
        """
        self._forget(tokens)
        first = self.length
        new = len(tokens) - first
        self.keeps_up = new < CHUNK
        if not new or (new < TOGETHER and not flush):
            return 0
        chunk = list(tokens[first : first + CHUNK])
        end = first + len(chunk)
        # The distribution after the last token is kept for the quantized cache, which has not computed it yet.
        earliest = min((at for at in self._quantized if first < at <= end), default=end)
        ids, keep = torch.tensor([chunk], device=self._model.device), end + 1 - earliest
        logits = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=keep).logits[0]
        self._computed += chunk
        self._full.clear()
        for at, row in enumerate(logits, earliest):
            if at in self._quantized or at == end:
                self._full[at] = row.float().log_softmax(-1)
                self._compare(at)
        return len(chunk)

    # -- inside ----------------------------------------------------------------------------------------

    def _compare(self, position: int) -> None:
        if position not in self._quantized or position not in self._full:
            return
        q, p = self._quantized.pop(position), self._full.pop(position)
        kl = float((p.exp() * (p - q)).sum())
        kl = max(0.0, kl) if kl < MOST_KL else MOST_KL  # rounding may give a tiny negative sum
        same = bool(p.argmax() == q.argmax())
        self.compared.append(Compared(position, kl, same))
        self.count += 1
        self.agreed += same
        self.kl_sum += kl
        self.kl_max = max(self.kl_max, kl)

    def _forget(self, tokens: Sequence[int]) -> None:
        """Takes back what is no longer the session's text."""
        if list(tokens[: self.length]) == self._computed:
            return
        pairs = zip_longest(self._computed, tokens[: self.length])
        kept = next(at for at, (mine, its) in enumerate(pairs) if mine != its)
        if any(self._cache.is_sliding):  # its layers have dropped what they would have to see again
            self._cache, kept = DynamicCache(config=self._model.config), 0
        else:
            self._cache.crop(kept - self.length)
        del self._computed[kept:]
        self._full.clear()
