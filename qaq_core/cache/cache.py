"""`QAQCache`: sequences as one transformers cache, for `generate` and for batched decoding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from qaq_core.attention.base import LayerInput
from qaq_core.attention.interface import attended, check_attended, hand_out
from qaq_core.attention.masks import MaskCheck, MaskColumns
from qaq_core.base.errors import ConfigError, UnsupportedModelError
from qaq_core.base.statistics import CacheStatistics
from qaq_core.cache.columns import NEW_PROMPT, Columns
from qaq_core.cache.decode_step import SequentialStep, Step, begin_decode, begin_draft
from qaq_core.cache.layers import LayerView
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.models.shape import layers_of
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
        self, sequences: Sequence[SequenceCache] = (), method: Method | None = None, originals: Originals | None = None
    ) -> None:
        if not isinstance(sequences, list | tuple) or (not sequences and method is None):
            raise ConfigError(
                "a QAQCache needs sequences, or a method to make them with; for a model write QAQCache.for_model(model)"
            )
        self.sequences = list(sequences)
        self.method = method or sequences[0].method
        self._originals = originals
        self._columns = Columns([sequence.length for sequence in sequences])
        self._view = bool(sequences)
        self._step: Step | None = None
        self._recording = self._prompt_next = False
        self._check_mask: MaskCheck | None = None
        self._layer = 0

    @classmethod
    def for_model(
        cls,
        model: Any,
        preset: str = "balanced",
        originals: Originals | None = None,
        **settings: Any,
    ) -> QAQCache:
        """An empty cache for a transformers causal LM; see `make_method` for the settings.

        A model that was never calibrated is calibrated now, which takes minutes, unless the preset needs none.

        Args:
            originals: where full-precision originals go; this process's memory if not given.
        Raises:
            UnsupportedModelError: the model cannot be served, and why.
            ConfigError: it is no model, or a setting is unknown or out of range.
        """
        if originals is not None and not (hasattr(originals, "put") and hasattr(originals, "requantize")):
            raise ConfigError(f"originals must be a store such as InProcessOriginals(), or None, not {originals!r:.80}")
        return cls([], make_method(model, preset=preset, **settings), originals)

    # -- transformers' protocol ------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands out the new keys [batch, kv_heads, n, head_dim]; attention stores them.

        Raises:
            UnsupportedModelError: keys or values are not those of the model that the cache was made for, or attention
                did not reach the cache after the update before.
        """
        shape = self.method.shape
        heads = (shape.kv_heads, shape.head_dim)
        if layer_idx >= shape.layers or key_states.shape[1::2] != heads or value_states.shape[1::2] != heads:
            raise UnsupportedModelError(
                f"this cache was made for {shape.layers} layers of {shape.kv_heads} KV heads with head_dim "
                f"{shape.head_dim}, not for layer {layer_idx} with keys {list(key_states.shape)} and values "
                f"{list(value_states.shape)}"
            )
        return hand_out(key_states, value_states, self, layer_idx), value_states

    @property
    def layers(self) -> list[LayerView]:
        """Views of the layers, which all share one pool."""
        return [LayerView(self, index) for index in range(len(self))]

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Columns seen, padding included."""
        return self._columns.count

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many columns a mask has, and how many come before them.

        Raises:
            ConfigError: the forward pass has no tokens, which is what `generate` makes of a prompt that is no longer
                than what the cache holds.
            UnsupportedModelError: attention did not reach the cache after the last update of the pass before.
        """
        check_attended(self)
        if not query_length:
            raise ConfigError(
                f"the cache holds {self._columns.count} tokens already, and the prompt has nothing beyond them: give "
                f"the whole text, of which they are the beginning, or, {NEW_PROMPT}"
            )
        return MaskColumns.of(self._columns.count + query_length, self), 0

    def announce(self, attention_mask: torch.Tensor | None) -> None:
        """The next forward pass has this 2-D mask, bool [batch, columns]; False is padding."""
        self._columns.announce(attention_mask)

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
        size = f"batch_size={self.batch_size}, tokens={self._columns.count}, nbytes={self.nbytes}"
        return f"QAQCache(preset={self.method.preset!r}, layers={len(self)}, {size})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QAQCache:
        """A cache with the same tokens; the method and the store are shared."""
        self.settle()
        other = copy.copy(self)
        other._columns = copy.copy(self._columns)
        other.sequences = [sequence.fork() for sequence in self.sequences]
        return other

    def reset(self) -> None:
        """Forgets every sequence."""
        for sequence in self.sequences:
            sequence.close()
        self.sequences, self._columns, self._step = [], Columns([]), None
        self._recording = self._prompt_next = False
        attended(self)

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
        gone = -max_length if max_length <= 0 else self._columns.count - max_length
        gone = max(0, min(gone, self._columns.count))
        for sequence in self.sequences:
            sequence.crop(max(0, sequence.length + sequence.drafted - gone))
        self._columns.count -= gone

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
        selected = torch.arange(len(self.sequences))[indices.cpu()].tolist()
        self._columns.select(selected)
        for i in selected:
            chosen.append(self.sequences[i].fork() if i in taken else self.sequences[i])
            taken.add(i)
        for i, sequence in enumerate(self.sequences):
            if i not in taken:
                sequence.close()
        self.sequences = chosen

    def __copy__(self) -> QAQCache:
        """A shallow copy, which does not go through pickling."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            "a QAQCache cannot be pickled or saved: its packed rows belong to a method in this process; keep the "
            "token ids and compute the prompt again, or let a store keep the originals (originals=)"
        )

    # -- attention -------------------------------------------------------------------------------------

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
        if n == 1 and all(sequence.batched and sequence.method is self.method for sequence in self.sequences):
            return begin_decode(self.method, self.sequences)
        first = self.sequences[0]
        if fresh == [n] and first.batched and first.drafting and first.method is self.method:
            return begin_draft(self.method, first, n)
        return SequentialStep(self.sequences, fresh)

    # -- measures --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Resident bytes of all sequences."""
        return sum(sequence.nbytes for sequence in self.sequences)

    def stats(self) -> list[CacheStatistics]:
        return [sequence.stats() for sequence in self.sequences]
