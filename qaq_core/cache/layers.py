"""Layers of a cache as transformers shows them: views that code which inspects caches can read."""

from __future__ import annotations

from typing import NoReturn, Protocol

import torch

from qaq_core.attention.reference import ReferenceAttention
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.method import Method
from qaq_core.cache.sequence import SequenceCache


class Viewed(Protocol):
    """What a view asks of its cache, see `QAQCache`."""

    sequences: list[SequenceCache]
    method: Method

    @property
    def batch_size(self) -> int: ...

    @property
    def is_croppable(self) -> bool: ...

    def get_seq_length(self, layer_idx: int | None = None) -> int: ...

    def get_max_length(self, layer_idx: int | None = None) -> int: ...

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]: ...

    def settle(self) -> None: ...


class LayerView:
    """One layer of a `QAQCache`, read only. Keys and values are dequantized whenever they are asked for.

    Args:
        index: of the layer.
    """

    is_compileable = is_sliding = False

    def __init__(self, cache: Viewed, index: int) -> None:
        self._cache, self._index = cache, index

    @property
    def keys(self) -> torch.Tensor | None:
        """[batch, kv_heads, columns, head_dim] in the model's dtype, after RoPE; 0 in padding and undecided drafts.

        None before the first forward pass.

        Raises:
            ConfigError: the sequences do not keep all their tokens.
        """
        return self._read(KEY)

    @property
    def values(self) -> torch.Tensor | None:
        """As `keys`."""
        return self._read(VALUE)

    @property
    def dtype(self) -> torch.dtype:
        return self._cache.method.dtype

    @property
    def device(self) -> torch.device:
        return self._cache.method.device

    @property
    def batch_size(self) -> int:
        return self._cache.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether there are tokens."""
        return self.get_seq_length() > 0

    @property
    def is_croppable(self) -> bool:
        return self._cache.is_croppable

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        return self._cache.get_max_length()

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, self._index)

    def update(self, *args: object, **kwargs: object) -> NoReturn:
        raise ConfigError("a layer of a QAQCache is a view: change the cache as a whole")

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = update

    def __repr__(self) -> str:
        return f"LayerView({self._index}: {self.get_seq_length()} tokens)"

    def _read(self, side: int) -> torch.Tensor | None:
        cache, shape = self._cache, self._cache.method.shape
        if not self.is_initialized:
            return None
        cache.settle()
        dims = (len(cache.sequences), shape.kv_heads, self.get_seq_length(), shape.head_dim)
        out = torch.zeros(dims, dtype=self.dtype, device=self.device)
        for i, sequence in enumerate(cache.sequences):
            held = read(sequence, side, self._index)
            stop = dims[2] - sequence.drafted
            out[i, :, stop - held.shape[1] : stop] = held
        return out


def read(sequence: SequenceCache, side: int, layer: int) -> torch.Tensor:
    """Keys or values of a layer of a sequence, dequantized: float32 [kv_heads, length, head_dim].

    Raises:
        ConfigError: the sequence does not keep all its tokens.
    """
    if not getattr(sequence, "croppable", False):
        raise ConfigError("this cache evicts tokens: it has no keys and values for every position")
    window, packed = sequence.residual.tokens(layer, side).float(), sequence.packed
    if not len(packed):
        return window
    transform = packed.quantizer.transform
    rows = ReferenceAttention(packed.quantizer.codec, packed.device).unpack(packed, side, layer)
    if side == VALUE:
        center = transform.value_center(layer)
        middle = transform.restore(layer, rows)
        middle = middle if center is None else middle + center.unsqueeze(1)
    else:  # a number of a key is its score with the query that asks for it
        ask = torch.eye(packed.head_dim, device=packed.device).repeat(packed.heads, 1, 1)
        scores = transform.query(layer, ask) @ rows.mT
        center = transform.center_scores(layer, ask, packed.start, packed.stop)
        middle = (scores if center is None else scores + center).mT
    return torch.cat([window[:, : packed.start], middle, window[:, packed.start :]], 1)
