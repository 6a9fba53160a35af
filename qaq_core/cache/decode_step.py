"""Decode steps: one token of each of several sequences, layer by layer.

`LayerwiseStep` does it with any attention. Where the C++ library can do all of it, `NativeStep` describes the
sequences once, and then makes one call a layer: it takes the new tokens in, attends, and transforms outputs
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int32, c_void_p
from typing import Protocol

import numpy as np
import torch

from qaq_core.attention.base import LayerInput
from qaq_core.attention.cpu import CpuAttention
from qaq_core.attention.fallback import supports_head_dim
from qaq_core.cache.method import Method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.kernels import LAYER, REDUCTIONS, SIDES, TYPES, DecodeStep, addresses


class Step(Protocol):
    def attend(self, given: LayerInput) -> torch.Tensor:
        """Stores the keys and values of the new tokens in a layer and attends to all tokens so far.

        Layers are in order.

        Returns:
            float32 [batch, query_heads, n, head_dim]; n is 1 in a decode step.
        """
        ...


def begin_decode(method: Method, sequences: Sequence[SequenceCache]) -> Step:
    """A decode step of sequences of that method: in C++ where it can do all of it."""
    attention, shape = method.attention, method.shape
    if isinstance(attention, CpuAttention) and attention.describer.looks_up and method.dtype in TYPES:
        plain = all(not s.prefilling and all(side.outliers is None for side in s.packed.sides) for s in sequences)
        if plain and supports_head_dim(shape.head_dim):
            return NativeStep(attention, method, sequences)
    return LayerwiseStep(method, sequences)


class SequentialStep:
    """One sequence after the other, of any kind, with any number of new tokens each.

    Args:
        fresh: how many of the last columns are each sequence's own; the columns before them are padding.
    """

    def __init__(self, sequences: Sequence[SequenceCache], fresh: Sequence[int]) -> None:
        self._sequences, self._fresh = sequences, fresh

    def attend(self, given: LayerInput) -> torch.Tensor:
        """See `Step`. Padding gives zeros."""
        query, columns = given.query, given.query.shape[2]
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        for i, (sequence, fresh) in enumerate(zip(self._sequences, self._fresh, strict=True)):
            own = slice(columns - fresh, columns)
            out[i, :, own] = sequence.attend(given.of(i, own))
        return out


class LayerwiseStep:
    def __init__(self, method: Method, sequences: Sequence[SequenceCache]) -> None:
        self._attention, self._sequences = method.attention, sequences

    def attend(self, given: LayerInput) -> torch.Tensor:
        """See `Step`."""
        taken = [s.take(given.layer, given.keys[i], given.values[i]) for i, s in enumerate(self._sequences)]
        tokens, observers = zip(*taken, strict=True)
        return self._attention.batch(given.query, tokens, given.scaling, given.sliding_window, observers)


class NativeStep:
    """The step in C++ (kernels/csrc/decode.h)."""

    def __init__(self, attention: CpuAttention, method: Method, sequences: Sequence[SequenceCache]) -> None:
        self._library = attention.library
        shape, batch = method.shape, len(sequences)
        self._dims = (batch, shape.query_heads, 1, shape.head_dim)
        self._records = np.empty((shape.layers, batch), LAYER)
        self._originals = np.zeros((shape.layers, batch), np.uintp)
        self._lengths = np.array([sequence.length + 1 for sequence in sequences])
        for i, sequence in enumerate(sequences):
            sequence.begin()
            self._describe(i, attention, sequence)
        self._records["kv_heads"], self._records["group"] = shape.kv_heads, shape.query_heads // shape.kv_heads
        self._records["dim"] = shape.head_dim
        self._scratch = torch.empty(batch, shape.query_heads, 4 * shape.head_dim)
        self._call = DecodeStep(type=TYPES[method.dtype], scratch=self._scratch.data_ptr())
        self._records_at = _rows_of(self._records)
        self._originals_at = _rows_of(self._originals) if method.dtype != method.residual_dtype else None
        maps = [addresses(part).tolist() for part in method.quantizer.transform.maps() or ()]
        self._maps_at = list(zip(*maps, strict=True))
        numbers = 2 * shape.kv_heads * shape.head_dim * int(self._lengths.sum())
        self._batch, self._threads = c_int32(batch), c_int32(attention.threads(numbers))

    def _describe(self, i: int, attention: CpuAttention, sequence: SequenceCache) -> None:
        """Fills in the records of the i-th sequence, and where its new token is written."""
        mine, describer = self._records[:, i], attention.describer
        has = len(sequence.packed) > 0
        mine[:] = describer.packed(sequence.packed).layers if has else describer.nothing(len(mine))
        exact = sequence.residual.held + 1
        mine["sinks"] = sinks = min(sequence.method.sinks, exact)
        mine["recent"] = exact - sinks
        room, originals = sequence.residual.places()
        mine["residual_type"] = TYPES[room.dtype]
        for index, side in enumerate(SIDES):
            mine[side]["residual"], mine[side]["residual_head_stride"] = addresses(room[:, index]), room.stride(2)
        if originals is not None:
            self._originals[:, i] = addresses(originals)
        if (observed := sequence.importance.observed) is not None:
            mine["reduction"] = REDUCTIONS[sequence.method.statistic.reduction]
            mine["observed"] = addresses(observed)

    def attend(self, given: LayerInput) -> torch.Tensor:
        """See `Step`."""
        layer, scaling, sliding_window = given.layer, given.scaling, given.sliding_window
        query, keys, values = given.query.contiguous(), given.keys.contiguous(), given.values.contiguous()
        out = torch.empty(self._dims)
        if sliding_window is not None:
            self._records["first"][layer] = np.maximum(self._lengths - sliding_window, 0)
        call = self._call
        call.query, call.key, call.value = query.data_ptr(), keys.data_ptr(), values.data_ptr()
        call.scaling, call.out = scaling, out.data_ptr()
        if self._maps_at:
            call.query_map, call.output_map = self._maps_at[layer]
        if self._originals_at is not None:
            call.originals = self._originals_at[layer]
        if self._library.qaq_decode(byref(call), c_void_p(self._records_at[layer]), self._batch, self._threads):
            raise MemoryError("no memory for the attention kernel's scratch")
        return out


def _rows_of(table: np.ndarray) -> list[int]:
    """Addresses of table[0], table[1], …"""
    return [table.ctypes.data + i * table.strides[0] for i in range(len(table))]
