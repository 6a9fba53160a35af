"""Decode steps in CUDA C++: sequences are described once, and a layer is three launches, four where it is observed.

The kernels take new tokens in themselves. What a step says about its sequences is one copy to the device, and the
originals of its tokens are one copy back, for which nobody waits until they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qaq_core.attention import CudaAttention
from qaq_core.attention.base import LayerInput
from qaq_core.attention.cuda_sequences import STEP, staged
from qaq_core.attention.cuda_step import StepKernels
from qaq_core.cache.method import Method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.kernels.cuda.structures import DTYPES, REDUCTIONS
from qaq_core.storage.arriving import Arriving


def cuda_attention(method: Method, sequences: Sequence[SequenceCache]) -> CudaAttention | None:
    """The method's attention if CUDA kernels can do all of the sequences' decode steps."""
    attention = method.attention
    if not isinstance(attention, CudaAttention) or method.dtype not in DTYPES:
        return None
    plain = all(one.packed.tiled and not one.prefilling for one in sequences)
    outliers = any(side.outliers is not None for one in sequences for side in one.packed.sides)
    return attention if plain and not outliers else None


class CudaStep:
    """See `Step`. Results are in the model's dtype, or in float32 where a sequence corrects them."""

    def __init__(self, attention: CudaAttention, method: Method, sequences: Sequence[SequenceCache]) -> None:
        for sequence in sequences:
            sequence.begin()
        self._sequences, shape, device = sequences, method.shape, method.device
        self._corrected = [(i, one) for i, one in enumerate(sequences) if one.in_time is not None]
        batch, heads, dim = len(sequences), shape.kv_heads, shape.head_dim
        self._last = shape.layers - 1
        self._fresh = torch.empty(batch, shape.layers, 2, heads, 1, dim, dtype=method.dtype, device=device)
        observed = [one.importance.observed.get(one.length) for one in sequences]
        watched = [0 if seen is None else seen.shape[2] for seen in observed]
        self._scores = torch.empty(sum(watched), shape.query_heads, device=device)
        residents = [attention.describer.resident(one.packed, one.residual.places()[0]) for one in sequences]
        steps = np.zeros(batch, STEP)
        steps["layers"] = [one.table.data_ptr() for one in residents]
        steps["originals"] = self._fresh.data_ptr() + np.arange(batch) * self._fresh.stride(0) * self._fresh.itemsize
        steps["new_place"] = held = np.array([one.residual.held for one in sequences])
        steps["exact_tokens"], steps["sinks"] = held + 1, np.minimum(held + 1, method.sinks)
        for step, one, seen, room in zip(steps, sequences, observed, self._scores.split(watched), strict=True):
            if seen is None:
                continue
            sums = one.importance.log_sums.get(one.length)
            step["scores"], step["statistic"] = room.data_ptr(), seen.data_ptr()
            step["log_sums"] = 0 if sums is None else sums.data_ptr()
            step["reduction"] = REDUCTIONS[method.statistic.reduction]
        self._kernels = StepKernels(
            attention.launcher,
            staged(steps, device).to(device, non_blocking=True),
            (batch, heads, shape.query_heads, dim),
            max(one.blocks for one in residents),
            method.dtype,
            method.residual_dtype,
            torch.float32 if self._corrected else method.dtype,
            max(watched),
        )
        longest = max((one.packed for one in sequences), key=len)
        self._layouts = attention.describer.layouts(longest) if len(longest) else None

    def attend(self, given: LayerInput) -> torch.Tensor:
        """See `Step`."""
        query, keys, values = (part[:, :, 0].contiguous() for part in given[1:4])
        layout = None if self._layouts is None else self._layouts[given.layer]
        out = self._kernels.layer(given.layer, layout, given.scaling, given.sliding_window, query, (keys, values))
        for i, sequence in self._corrected:
            sequence.correct(0, given.layer, query[i], given.scaling, out[i])
        if given.layer == self._last:
            arriving = Arriving(self._fresh)
            for i, sequence in enumerate(self._sequences):
                sequence.staging.expect(arriving, i)
        return out.unsqueeze(2)
