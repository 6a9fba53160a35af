"""`QAQCache`: sequences as one transformers cache, for `generate` and for batched decoding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from qaq_core.attention.interface import attended, check_attended, hand_out
from qaq_core.attention.masks import MaskColumns
from qaq_core.base.errors import ConfigError, UnsupportedModelError
from qaq_core.base.statistics import CacheStatistics
from qaq_core.cache.columns import NEW_PROMPT, Columns
from qaq_core.cache.layers import LayerView
from qaq_core.cache.method import Method
from qaq_core.cache.passes import ForwardPasses
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache, forks
from qaq_core.storage.originals import Originals


class QAQCache(ForwardPasses, Cache):
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
        super().__init__(sequences, method or sequences[0].method, originals)

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
        shape, new = self.method.shape, key_states.shape
        fits = new[1] == shape.kv_heads and new[3] == shape.head_dim and value_states.shape == new
        if layer_idx >= shape.layers or not fits:
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
        other.sequences = forks(self.sequences)
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

    # -- other sequences -------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the sequences of those indices. One that is taken twice is forked, one that is not is closed."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence: the first `repeats` are forks of the first one."""
        self.batch_select_indices(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Takes the sequences of those indices, or of a mask; see `reorder_cache`. If it fails, nothing has changed."""
        self.settle()
        selected = torch.arange(len(self.sequences))[indices.cpu()].tolist()
        again = [place for place, i in enumerate(selected) if i in selected[:place]]
        chosen = [self.sequences[i] for i in selected]
        for place, other in zip(again, forks([chosen[place] for place in again]), strict=True):
            chosen[place] = other
        for i in set(range(len(self.sequences))) - set(selected):
            self.sequences[i].close()
        self._columns.select(selected)
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

    # -- measures --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Resident bytes of all sequences."""
        return sum(sequence.nbytes for sequence in self.sequences)

    def stats(self) -> list[CacheStatistics]:
        return [sequence.stats() for sequence in self.sequences]
