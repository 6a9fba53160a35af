"""Forward passes over a batch of sequences: what a model's attention calls, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qaq_core.attention.base import LayerInput
from qaq_core.attention.interface import attended
from qaq_core.attention.masks import MaskCheck
from qaq_core.base.errors import ConfigError, UnsupportedModelError
from qaq_core.cache.columns import Columns
from qaq_core.cache.decode_step import SequentialStep, Step, begin_decode, begin_draft
from qaq_core.cache.method import Method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.models.shape import layers_of
from qaq_core.storage.originals import Originals

LONGEST_DRAFT = 64
"""Columns of a pass that may be a draft after `QAQCache.activate_past_recording`; a longer one is a prompt."""


class ForwardPasses:
    """The sequences of a `QAQCache` in forward passes.

    Args:
        sequences: may be empty; then the first pass makes as many as its batch has.
        method: of all sequences. originals: store for the sequences that are made.
    """

    def __init__(self, sequences: Sequence[SequenceCache], method: Method, originals: Originals | None) -> None:
        self.sequences, self.method = list(sequences), method
        self._originals = originals
        self._columns = Columns([sequence.length for sequence in sequences])
        self._view = bool(sequences)
        self._step: Step | None = None
        self._recording = self._prompt_next = False
        self._check_mask: MaskCheck | None = None
        self._layer = 0
        self._places: torch.Tensor | None = None

    def announce(self, attention_mask: torch.Tensor | None) -> None:
        """The next forward pass has this 2-D mask, bool [batch, columns]; False is padding."""
        self._columns.announce(attention_mask)

    def place(self, positions: torch.Tensor) -> None:
        """The positions of the next forward pass, int64 [batch, n] on the host, where they are known there: then nobody
        waits for those that the model is given on a device."""
        self._places = positions

    def settle(self) -> None:
        """Accepts the drafts after `activate_past_recording` that were not cropped."""
        for sequence in self.sequences if self._recording else []:
            if sequence.drafted:
                sequence.accept(sequence.drafted)

    def check_model(self, config: Any) -> None:
        """Refuses the layers of another model.

        Args:
            config: transformers' configuration of the layers that attend; None if they do not say.
        """
        shape = self.method.shape
        layers, kind = (shape.layers, shape.model_type) if config is None else (layers_of(config), config.model_type)
        if (layers, kind) != (shape.layers, shape.model_type):
            raise UnsupportedModelError(
                f"this cache was made for a {shape.model_type} model of {shape.layers} layers, and a {kind} model of "
                f"{layers} layers uses it: make one for that model with QAQCache.for_model"
            )

    def attend(
        self, given: LayerInput, position_ids: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[batch, query_heads, n, head_dim], each sequence over its own tokens; padding gives zeros.

        Args:
            mask: [batch or 1, heads or 1, n, columns], bool or additive; None for causal attention.
        Raises:
            ConfigError: the batch, mask or positions do not continue what the cache holds.
            UnsupportedModelError: the mask hides other tokens than the cache does, or layers do not attend in order.
        """
        if not self._view and torch.is_inference_mode_enabled():
            # What a pass makes there, no later one outside could change.
            with torch.inference_mode(False), torch.no_grad():
                return self._attend(given, position_ids, mask)
        return self._attend(given, position_ids, mask)

    def _attend(self, given: LayerInput, position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        attended(self)
        batch, _, n, _ = given.query.shape
        if given.layer == 0:
            self._check_begin(given)
            self._step = self.begin_step(batch, n, position_ids, mask, given.sliding_window)
            self._layer = 0
        if self._step is None or given.layer != self._layer:
            raise UnsupportedModelError(
                f"layer {given.layer} attends where layer {self._layer} should: a QAQ cache takes every layer once, in "
                "order; call reset() if a forward pass was broken off"
            )
        if mask is not None and given.layer and self._check_mask is not None:
            self._check_mask(mask, given.sliding_window)
        out = self._step.attend(given)
        self._layer += 1
        if self._layer == self.method.shape.layers:
            self._step = self._check_mask = None
            for sequence in self.sequences:
                sequence.commit()
            self._columns.count += n
        return out

    def _check_begin(self, given: LayerInput) -> None:
        """Checks what a forward pass begins with: the pass before has ended, and numbers are of the method's type."""
        layers, dtype = self.method.shape.layers, self.method.dtype
        if self._step is not None:
            raise UnsupportedModelError(
                f"the forward pass before ended after {self._layer} of {layers} layers: it was broken off, or the "
                "model is not the one that this cache was made for; call reset() or make a new cache"
            )
        for part in (given.query, given.keys, given.values):
            if part.dtype != dtype:
                raise ConfigError(
                    f"this cache was made for a model in {dtype}, and the model computes in {part.dtype} now (moved by "
                    "to(), or autocast); make the cache after that"
                )

    def begin_step(
        self,
        batch: int,
        n: int,
        position_ids: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        sliding_window: int | None = None,
    ) -> Step:
        """The step that attends for a forward pass over n columns, which are checked against what the cache holds.

        Args:
            mask, sliding_window: the first layer's.
        """
        self.settle()
        known, self._places = self._places, None
        position_ids = position_ids if known is None else known
        if self.sequences and batch != len(self.sequences):
            raise ConfigError(
                f"the cache holds {len(self.sequences)} sequences, the batch has {batch}; for another batch, call "
                "reset() or make a new cache"
            )
        lengths = [sequence.length for sequence in self.sequences] or [0] * batch
        fresh, self._check_mask = self._columns.begin_pass(lengths, n, position_ids, mask, sliding_window)
        self.sequences = self.sequences or [self.method.sequence(self._originals) for _ in range(batch)]
        if self._recording and not self._prompt_next and 1 < n <= LONGEST_DRAFT:
            for sequence, tokens in zip(self.sequences, fresh, strict=True):
                sequence.expect_draft(tokens)
        self._prompt_next = False
        if fresh == [1] * batch:
            return begin_decode(self.sequences)
        first = self.sequences[0]
        if fresh == [n] and first.batched and first.drafting and first.method is self.method:
            return begin_draft(self.method, first, n)
        return SequentialStep(self.sequences, fresh)
