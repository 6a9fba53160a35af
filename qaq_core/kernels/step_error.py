"""The error of a decode step in C++ (csrc/step_error.h); `allocation.StepErrors` defines the results."""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from typing import Any

import numpy as np
import torch

from qaq_core.allocation.policies import BalancedPolicy
from qaq_core.allocation.step_error import MOST_FOUND, NEGLIGIBLE, Found, StepErrors
from qaq_core.base.pages import KEY, VALUE
from qaq_core.kernels.layers import addresses
from qaq_core.kernels.library import checked
from qaq_core.kernels.structures import StepError
from qaq_core.quantization.codecs import Codec
from qaq_core.storage import PackedTokens

_JOB = np.dtype(StepError)


class NativeStepErrors(StepErrors):
    """`StepErrors` on a CPU."""

    def __init__(self, policy: BalancedPolicy, codec: Codec, head_dim: int, library: Any) -> None:
        super().__init__(policy, codec, head_dim)
        self._library = library
        library.qaq_step_error.restype = c_int64

    def step(self, packed: PackedTokens, observed: torch.Tensor, factors: torch.Tensor) -> NativeStepError:
        """See `StepErrors`."""
        return NativeStepError(self._library, self.lost, packed, observed, factors)


class NativeStepError:
    """One step's error: a call a layer, described once."""

    def __init__(
        self,
        library: Any,
        lost: tuple[torch.Tensor, ...],
        packed: PackedTokens,
        observed: torch.Tensor,
        factors: torch.Tensor,
    ) -> None:
        self._library, self._tokens = library, len(packed)
        meta = [side.expand(*packed.tags.shape, 1) for side in packed.metas]
        self._found = torch.empty(MOST_FOUND, dtype=torch.int64), torch.empty(MOST_FOUND)
        self._totals = torch.zeros(packed.layers, dtype=torch.float64)
        mine = observed[:, :, packed.start :]
        self._jobs = jobs = np.zeros(packed.layers, _JOB)
        jobs["heads"], jobs["tokens"] = packed.heads, len(packed)
        jobs["observed"], jobs["observed_stride"] = addresses(mine), mine.stride(1)
        jobs["factors"] = addresses(factors)
        jobs["tags"], jobs["tags_stride"] = addresses(packed.tags), packed.tags.stride(1)
        jobs["key_meta"], jobs["value_meta"] = addresses(meta[KEY]), addresses(meta[VALUE])
        jobs["meta_stride"] = meta[KEY].stride(1)
        jobs["key_lost"], jobs["value_lost"] = addresses(lost[KEY]), addresses(lost[VALUE])
        jobs["negligible"], jobs["room"] = NEGLIGIBLE, MOST_FOUND
        jobs["index"], jobs["error"] = (part.data_ptr() for part in self._found)
        jobs["total"] = addresses(self._totals)
        self._alive = observed, factors, packed.tags, meta, lost

    def look(self, layer: int, least: float) -> Found | None:
        """See `StepError`."""
        self._jobs["least"][layer] = least
        place = self._jobs.ctypes.data + layer * _JOB.itemsize
        count = min(checked(self._library.qaq_step_error, c_void_p(place)), MOST_FOUND)
        if not count:
            return None
        index, error = (part[:count].clone() for part in self._found)
        return Found(index // self._tokens, index % self._tokens, error)

    @property
    def total(self) -> float:
        """See `StepError`."""
        return float(self._totals.sum())
