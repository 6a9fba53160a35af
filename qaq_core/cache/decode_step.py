"""Decode steps: one token of each of several sequences, or the draft of one, layer by layer.

Sequences of one method are computed together, see `begin_decode`. `LayerwiseStep` does it with any attention. Where the
C++ library can do all of it, `NativeStep` describes the sequences once, and then makes one call a layer: it takes the
new tokens in, attends, and transforms outputs back. `NativeDraft` makes one call a layer for each token of the draft,
as if they were decoded one by one.
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
from qaq_core.cache.cuda_step import CudaStep, cuda_attention
from qaq_core.cache.method import Method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.kernels import LAYER, REDUCTIONS, SIDES, TYPES, DecodeStep, addresses, checked


class Step(Protocol):
    def attend(self, given: LayerInput) -> torch.Tensor:
        """Stores the keys and values of the new tokens in a layer and attends to all tokens so far.

        Layers are in order.

        Returns:
            [batch, query_heads, n, head_dim] in float32, or in the model's dtype; n is 1 in a decode step.
        """
        ...


def begin_decode(sequences: Sequence[SequenceCache]) -> Step:
    """A decode step: those of one method together, in C++ where it can do all of it, and others one by one."""
    groups: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(id(sequence.method) if sequence.batched else -1 - i, []).append(i)
    steps = [(rows, _begin_alike([sequences[i] for i in rows])) for rows in groups.values()]
    return steps[0][1] if len(steps) == 1 else GroupedStep(steps)


def _begin_alike(sequences: Sequence[SequenceCache]) -> Step:
    """A decode step of sequences of one method, or of one that is computed alone."""
    if not sequences[0].batched:
        return SequentialStep(sequences, [1])
    method = sequences[0].method
    if (native := native_attention(method, sequences)) is not None:
        return NativeStep(native, method, sequences)
    if (cuda := cuda_attention(method, sequences)) is not None:
        return CudaStep(cuda, method, sequences)
    return LayerwiseStep(method, sequences)


def begin_draft(method: Method, sequence: SequenceCache, tokens: int) -> Step:
    """The step of a draft that was announced to a sequence: in C++ where it can do all of it."""
    attention = native_attention(method, [sequence])
    return SequentialStep([sequence], [tokens]) if attention is None else NativeDraft(attention, sequence, tokens)


def native_attention(method: Method, sequences: Sequence[SequenceCache]) -> CpuAttention | None:
    """The method's attention if the C++ library can do all of the sequences' decode steps."""
    attention = method.attention
    if isinstance(attention, CpuAttention) and attention.describer.looks_up and method.dtype in TYPES:
        plain = all(not s.prefilling and all(side.outliers is None for side in s.packed.sides) for s in sequences)
        if plain and supports_head_dim(method.shape.head_dim):
            return attention
    return None


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
        if self._fresh == [columns]:
            return self._sequences[0].attend(given.of(0, slice(None))).unsqueeze(0)
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        for i, (sequence, fresh) in enumerate(zip(self._sequences, self._fresh, strict=True)):
            own = slice(columns - fresh, columns)
            out[i, :, own] = sequence.attend(given.of(i, own))
        return out


class GroupedStep:
    """Steps of several groups of sequences.

    Args:
        steps: the rows of the batch that are a group's, and its step.
    """

    def __init__(self, steps: Sequence[tuple[list[int], Step]]) -> None:
        self._steps = steps

    def attend(self, given: LayerInput) -> torch.Tensor:
        """See `Step`."""
        out = torch.empty(given.query.shape, dtype=torch.float32, device=given.query.device)
        for rows, step in self._steps:
            out[rows] = step.attend(given.rows(rows))
        return out


class LayerwiseStep:
    def __init__(self, method: Method, sequences: Sequence[SequenceCache]) -> None:
        self._attention, self._sequences = method.attention, sequences

    def attend(self, given: LayerInput) -> torch.Tensor:
        """See `Step`."""
        taken = [s.take(given.layer, given.keys[i], given.values[i]) for i, s in enumerate(self._sequences)]
        tokens, observers = zip(*taken, strict=True)
        out = self._attention.batch(given.query, tokens, given.scaling, given.sliding_window, observers)
        for i, sequence in enumerate(self._sequences):
            sequence.correct(0, given.layer, given.query[i, :, 0], given.scaling, out[i, :, 0])
        return out


class NativeStep:
    """The step in C++ (kernels/csrc/decode.h)."""

    def __init__(self, attention: CpuAttention, method: Method, sequences: Sequence[SequenceCache]) -> None:
        for sequence in sequences:
            sequence.begin()
        self._begin(attention, method, [(sequence, 0) for sequence in sequences])

    def _begin(self, attention: CpuAttention, method: Method, queries: Sequence[tuple[SequenceCache, int]]) -> None:
        """Describes the sequences of a batch of queries; each is that many tokens behind its sequence's next one."""
        self._library = attention.library
        shape, batch = method.shape, len(queries)
        self._dims = (batch, shape.query_heads, 1, shape.head_dim)
        self._records = np.empty((shape.layers, batch), LAYER)
        self._originals = np.zeros((shape.layers, batch), np.uintp)
        self._corrected = [(i, one) for i, (one, _) in enumerate(queries) if one.in_time is not None]
        self._lengths = np.array([sequence.length + ahead + 1 for sequence, ahead in queries])
        for i, (sequence, ahead) in enumerate(queries):
            self._describe(i, attention, sequence, ahead)
        self._records["kv_heads"], self._records["group"] = shape.kv_heads, shape.query_heads // shape.kv_heads
        self._records["dim"] = shape.head_dim
        self._scratch = torch.empty(batch, shape.query_heads, 4 * shape.head_dim)
        self._call = DecodeStep(type=TYPES[method.dtype], scratch=self._scratch.data_ptr())
        self._records_at = _rows_of(self._records)
        self._originals_at = _rows_of(self._originals) if method.dtype != method.residual_dtype else None
        maps = [addresses(part).tolist() for part in method.quantizer.transform.maps() or ()]
        self._maps_at = list(zip(*maps, strict=True))
        numbers = 2 * shape.kv_heads * shape.head_dim * int(self._lengths.sum())
        self._threads = c_int32(attention.threads(numbers))

    def _describe(self, i: int, attention: CpuAttention, sequence: SequenceCache, ahead: int) -> None:
        """Fills in the records of the i-th query, and where its token is written."""
        mine, describer = self._records[:, i], attention.describer
        has = len(sequence.packed) > 0
        mine[:] = describer.packed(sequence.packed).layers if has else describer.nothing(len(mine))
        exact = sequence.residual.held + ahead + 1
        mine["sinks"] = sinks = min(sequence.method.sinks, exact)
        mine["recent"] = exact - sinks
        room, originals = sequence.residual.places()
        mine["residual_type"] = TYPES[room.dtype]
        for index, side in enumerate(SIDES):
            mine[side]["residual"], mine[side]["residual_head_stride"] = addresses(room[:, index]), room.stride(2)
        if originals is not None:
            self._originals[:, i] = addresses(originals)
        if (observed := sequence.importance.observed.get(sequence.length + ahead)) is not None:
            mine["reduction"] = REDUCTIONS[sequence.method.statistic.reduction]
            mine["observed"] = addresses(observed)
        if (sums := sequence.importance.log_sums.get(sequence.length + ahead)) is not None:
            mine["log_sums"] = addresses(sums)

    def attend(self, given: LayerInput) -> torch.Tensor:
        """See `Step`."""
        query, keys, values = given.query.contiguous(), given.keys.contiguous(), given.values.contiguous()
        out = torch.empty(self._dims)
        self._prepare(given)
        call = self._call
        call.query, call.key, call.value = query.data_ptr(), keys.data_ptr(), values.data_ptr()
        call.out = out.data_ptr()
        self._run(self._records_at[given.layer], self._dims[0])
        for i, sequence in self._corrected:
            sequence.correct(0, given.layer, query[i, :, 0], given.scaling, out[i, :, 0])
        return out

    def _prepare(self, given: LayerInput) -> None:
        """Tells a layer's scaling, sliding window and tables."""
        layer, call = given.layer, self._call
        if given.sliding_window is not None:
            self._records["first"][layer] = np.maximum(self._lengths - given.sliding_window, 0)
        call.scaling = given.scaling
        if self._maps_at:
            call.query_map, call.output_map = self._maps_at[layer]
        if self._originals_at is not None:
            call.originals = self._originals_at[layer]

    def _run(self, records: int, count: int) -> None:
        checked(self._library.qaq_decode, byref(self._call), c_void_p(records), c_int32(count), self._threads)


class NativeDraft(NativeStep):
    """A draft in C++: each of its tokens in a call of its own, which sees those before it."""

    def __init__(self, attention: CpuAttention, sequence: SequenceCache, tokens: int) -> None:
        sequence.begin(tokens)
        self._sequence, self._residual = sequence, sequence.residual
        self._begin(attention, sequence.method, [(sequence, ahead) for ahead in range(tokens)])
        self._originals_at = None  # `ResidualWindow.write` stores them
        shape = sequence.method.shape
        self._threads = c_int32(attention.threads(2 * shape.kv_heads * shape.head_dim * int(self._lengths[-1])))

    def attend(self, given: LayerInput) -> torch.Tensor:
        """See `Step`."""
        self._residual.write(given.layer, given.keys[0], given.values[0])
        query, keys, values = (part[0].transpose(0, 1).contiguous() for part in given[1:4])
        out = torch.empty(self._dims)
        self._prepare(given)
        call, records = self._call, self._records_at[given.layer]
        for i, (one, key, value, mine) in enumerate(zip(query, keys, values, out, strict=True)):
            call.query, call.key, call.value, call.out = (part.data_ptr() for part in (one, key, value, mine))
            self._run(records + i * self._records.strides[1], 1)
            if self._corrected:
                self._sequence.correct(i, given.layer, one, given.scaling, mine[:, 0])
        return out.transpose(0, 2).contiguous()


def _rows_of(table: np.ndarray) -> list[int]:
    """Addresses of table[0], table[1], …"""
    return [table.ctypes.data + i * table.strides[0] for i in range(len(table))]
