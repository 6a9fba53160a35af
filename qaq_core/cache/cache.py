"""`QAQCache`: sequences as one transformers cache, for `generate` and for batched decoding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from qaq_core.attention.base import LayerInput
from qaq_core.attention.interface import attended, mark
from qaq_core.base.errors import ConfigError, UnsupportedModelError
from qaq_core.base.statistics import CacheStatistics
from qaq_core.cache.decode_step import SequentialStep, Step, begin_decode, begin_draft
from qaq_core.cache.layers import LayerView
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.storage.originals import Originals

LONGEST_DRAFT = 64
"""Columns of a pass that may be a draft after `QAQCache.activate_past_recording`; a longer one is a prompt."""


class QAQCache(Cache):
    """A batch of quantized sequences.

    Either made for a model, and then it grows to the batch that `generate` brings:

        model.generate(**inputs, past_key_values=QAQCache.for_model(model, preset="balanced"))

    or a view over sequences of any lengths, for one forward pass at a time, with explicit `position_ids`.
    Padding must be on the left.
    """

    is_compileable = False

    def __init__(
        self, sequences: Sequence[SequenceCache], method: Method | None = None, originals: Originals | None = None
    ) -> None:
        if not sequences and method is None:
            raise ConfigError("a QAQCache needs sequences, or a method to make them with")
        self.sequences = list(sequences)
        self.method = method or sequences[0].method
        self._originals = originals
        self._columns = max((sequence.length for sequence in sequences), default=0)
        self._step: Step | None = None
        self._recording = self._prompt_next = False

    @classmethod
    def for_model(
        cls,
        model: Any,
        preset: str = "balanced",
        originals: Originals | None = None,
        **settings: Any,
    ) -> QAQCache:
        """An empty cache for a transformers causal LM; see `make_method` for the settings."""
        return cls([], make_method(model, preset=preset, **settings), originals)

    # -- transformers' protocol ------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks the new keys [batch, kv_heads, n, head_dim]; attention stores them.

        Raises:
            UnsupportedModelError: the keys are not those of the model that the cache was made for, or attention did
                not reach the cache after the update before.
        """
        shape = self.method.shape
        if layer_idx >= shape.layers or key_states.shape[1::2] != (shape.kv_heads, shape.head_dim):
            raise UnsupportedModelError(
                f"this cache was made for {shape.layers} layers of {shape.kv_heads} KV heads with head_dim "
                f"{shape.head_dim}, not for layer {layer_idx} with keys {list(key_states.shape)}"
            )
        return mark(key_states, self, layer_idx), value_states

    @property
    def layers(self) -> list[LayerView]:
        """Views of the layers, which all share one pool."""
        return [LayerView(self, index) for index in range(len(self))]

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Columns seen, padding included."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def max_cache_len(self) -> int:
        return self.get_max_length()

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first forward pass of a cache that was made for a model."""
        return len(self.sequences) or -1

    max_batch_size = batch_size

    def __len__(self) -> int:
        return self.method.shape.layers

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        # A sliding layer keeps all its tokens too; attention masks what has slid out.
        return [False] * self.method.shape.layers

    is_linear = is_dummy = is_sliding

    def __repr__(self) -> str:
        size = f"batch_size={self.batch_size}, tokens={self._columns}, nbytes={self.nbytes}"
        return f"QAQCache(preset={self.method.preset!r}, layers={len(self)}, {size})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QAQCache:
        """A cache with the same tokens; the method and the store are shared."""
        self.settle()
        other = copy.copy(self)
        other.sequences = [sequence.fork() for sequence in self.sequences]
        return other

    def reset(self) -> None:
        """Forgets every sequence."""
        for sequence in self.sequences:
            sequence.close()
        self.sequences, self._columns = [], 0
        self._recording = self._prompt_next = False

    # -- tokens off the end ----------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        return all(getattr(sequence, "croppable", False) for sequence in self.sequences)

    def crop(self, max_length: int) -> None:
        """Removes tokens off the end of every sequence, see `SequenceCache.crop`.

        Args:
            max_length: columns to keep if it is above 0. Otherwise minus the number of columns to remove, as
                transformers' `generate` counts; 0 removes none.
        """
        gone = -max_length if max_length <= 0 else self._columns - max_length
        gone = max(0, min(gone, self._columns))
        for sequence in self.sequences:
            sequence.crop(max(0, sequence.length + sequence.drafted - gone))
        self._columns -= gone

    def activate_past_recording(self) -> None:
        """After the next forward pass, one over 2 to `LONGEST_DRAFT` columns is a draft whose end `crop` may refuse.

        Assisted decoding calls it before a prompt. A draft that is not cropped counts as a whole, as if it had been
        decoded column by column. What is longer is a prompt, and can be cropped too.
        """
        self._recording = self._prompt_next = True

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self._recording

    def settle(self) -> None:
        """Accepts the drafts after `activate_past_recording` that were not cropped."""
        for sequence in self.sequences if self._recording else []:
            if sequence.drafted:
                sequence.accept(sequence.drafted)

    # -- other sequences -------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the sequences of those indices. One that is taken twice is forked, one that is not is closed."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence: the first `repeats` are forks of the first one."""
        self.batch_select_indices(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Takes the sequences of those indices, or of a mask; see `reorder_cache`."""
        self.settle()
        taken: set[int] = set()
        chosen = []
        for i in torch.arange(len(self.sequences))[indices].tolist():
            chosen.append(self.sequences[i].fork() if i in taken else self.sequences[i])
            taken.add(i)
        for i, sequence in enumerate(self.sequences):
            if i not in taken:
                sequence.close()
        self.sequences = chosen

    # -- attention -------------------------------------------------------------------------------------

    def attend(self, given: LayerInput, position_ids: torch.Tensor | None) -> torch.Tensor:
        """[batch, query_heads, n, head_dim], each sequence over its own tokens; padding gives zeros."""
        attended(self)
        batch, _, n, _ = given.query.shape
        if given.layer == 0:
            self._step = self.begin_step(batch, n, position_ids)
        assert self._step is not None, "layers attend in order"
        out = self._step.attend(given)
        if given.layer == self.method.shape.layers - 1:
            self._step = None
            for sequence in self.sequences:
                sequence.commit()
            self._columns += n
        return out

    def begin_step(self, batch: int, n: int, position_ids: torch.Tensor | None) -> Step:
        """The step that attends for a forward pass over n columns, which are checked against the sequences' lengths."""
        self.settle()
        fresh = self._new_tokens(batch, n, position_ids)
        if self._recording and not self._prompt_next and 1 < n <= LONGEST_DRAFT:
            for sequence, tokens in zip(self.sequences, fresh, strict=True):
                sequence.expect_draft(tokens)
        self._prompt_next = False
        if n == 1 and all(sequence.batched and sequence.method is self.method for sequence in self.sequences):
            return begin_decode(self.method, self.sequences)
        first = self.sequences[0]
        if fresh == [n] and first.batched and first.drafting and first.method is self.method:
            return begin_draft(self.method, first, n)
        return SequentialStep(self.sequences, fresh)

    def _new_tokens(self, batch: int, n: int, position_ids: torch.Tensor | None) -> list[int]:
        """How many of the n columns are real tokens of each sequence: the last ones."""
        if not self.sequences:
            self.sequences = [self.method.sequence(self._originals) for _ in range(batch)]
        if batch != len(self.sequences):
            raise ConfigError(f"the cache holds {len(self.sequences)} sequences, the batch has {batch}")
        if position_ids is None:
            return [n] * batch
        rows = position_ids.expand(batch, -1).tolist()
        counts = []
        for sequence, row in zip(self.sequences, rows, strict=True):
            fresh = row[-1] + 1 - sequence.length
            padding, tokens = row[: n - fresh], row[n - fresh :]
            known = tokens == list(range(sequence.length, sequence.length + fresh)) and len(set(padding)) <= 1
            if not 1 <= fresh <= n or not known:
                raise ConfigError("positions do not continue the sequence: pad on the left and pass an attention mask")
            counts.append(fresh)
        return counts

    # -- measures --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Resident bytes of all sequences."""
        return sum(sequence.nbytes for sequence in self.sequences)

    def stats(self) -> list[CacheStatistics]:
        return [sequence.stats() for sequence in self.sequences]
