"""Decode attention in CUDA C++ (kernels/cuda/): `prepare`, `split`, `merge` for a layer of a batch, and `observe`.

Which machine runs them is a `Launcher`'s: a GPU's driver, or a CPU that pretends to be one in tests. A decode step in
which they do everything goes through `CudaStep` instead, which describes sequences once for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qaq_core.allocation.attention_statistics import Observer, StepObserver
from qaq_core.attention.cuda_sequences import SEQUENCE, STEP, Describer, staged
from qaq_core.attention.cuda_step import StepKernels
from qaq_core.attention.cuda_tables import refused_codec, refused_layout
from qaq_core.attention.fallback import KernelWithFallback
from qaq_core.attention.reference import LayerTokens, ReferenceAttention
from qaq_core.base.errors import ConfigError
from qaq_core.kernels.cuda import emulation
from qaq_core.kernels.cuda.driver import DriverLauncher, missing_kernels
from qaq_core.kernels.cuda.launcher import Launcher
from qaq_core.kernels.cuda.structures import DTYPES, HEAD_DIMS, MOST_GROUP, REDUCTIONS
from qaq_core.quantization.codecs import Codec


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, with what to do about it; None if they can."""
    if device.type == "cpu":
        return emulation.missing()
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return missing_kernels(torch.cuda.get_device_capability(device))


def launcher(device: torch.device) -> Launcher:
    """What runs kernels on a device.

    Raises:
        ConfigError: nothing does; with what to do about it.
    """
    reason = missing(device)
    if reason is not None:
        raise ConfigError(f"QAQ_KERNEL=cuda: {reason}")
    return DriverLauncher(device) if device.type == "cuda" else emulation.Emulation()


class CudaAttention(KernelWithFallback):
    """The operation in CUDA C++ for one query position.

    Attributes:
        describer: tells the kernels where packed tokens are.
    """

    def __init__(self, codec: Codec, device: torch.device, launcher: Launcher) -> None:
        super().__init__(ReferenceAttention(codec, device), "CUDA")
        self._codec, self._device, self.launcher = codec, device, launcher
        self._refused = refused_codec(codec)
        self.describer = Describer(codec, device)

    @property
    def name(self) -> str:
        return self.launcher.name

    def unsupported(self, query: torch.Tensor, tokens: LayerTokens, observer: Observer | None) -> str | None:
        """See `KernelWithFallback`."""
        reason = super().unsupported(query, tokens, observer)
        if reason is None and tokens.packed is not None and not tokens.packed.tiled:
            reason = "rows that are not in tiles"
        return reason or self.refused(query.shape[-1], query.shape[-3] // tokens.keys.shape[0])

    def refused(self, head_dim: int, group: int) -> str | None:
        """Why the kernels do not take heads of a model; None if they do."""
        if head_dim not in HEAD_DIMS:
            return f"a head_dim of {head_dim}"
        if group > MOST_GROUP:
            return f"{group} query heads for a KV head"
        return self._refused or refused_layout(self._codec, head_dim)

    def decode(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[StepObserver | None],
    ) -> torch.Tensor:
        """See `KernelWithFallback`."""
        query = (query if query.dtype in DTYPES else query.float()).contiguous()
        types = {mine.keys.dtype for mine in tokens}
        exact_dtype = types.pop() if len(types) == 1 else torch.float32
        exact = [tuple(rows.to(exact_dtype) for rows in (mine.keys, mine.values)) for mine in tokens]
        records = np.concatenate([self._sequence(mine, rows) for mine, rows in zip(tokens, exact, strict=True)])
        steps = np.zeros(len(tokens), STEP)
        watched = [mine.length if observe is not None else 0 for mine, observe in zip(tokens, observers, strict=True)]
        scores = torch.empty(sum(watched), query.shape[1], device=self._device)
        for step, mine, observe, room in zip(steps, tokens, observers, scores.split(watched), strict=True):
            step["sinks"], step["exact_tokens"], step["new_place"] = mine.sinks, mine.keys.shape[1], -1
            if observe is not None:
                step["scores"], step["statistic"] = room.data_ptr(), observe.into.data_ptr()
                step["reduction"] = REDUCTIONS[observe.reduction]
                step["log_sums"] = 0 if observe.log_sums is None else observe.log_sums.data_ptr()
        table = torch.empty(records.nbytes + steps.nbytes, dtype=torch.uint8, device=self._device)
        steps["layers"] = table.data_ptr() + np.arange(len(tokens)) * SEQUENCE.itemsize
        both = np.concatenate([part.reshape(-1).view(np.uint8) for part in (records, steps)])
        table.copy_(staged(both, self._device), non_blocking=True)
        batch, query_heads, dim = query.shape
        kernels = StepKernels(
            self.launcher,
            table[records.nbytes :],
            (batch, tokens[0].keys.shape[0], query_heads, dim),
            int(records["blocks"].max()),
            query.dtype,
            exact_dtype,
            torch.float32,
            max(watched),
        )
        longest = max((mine.packed for mine in tokens if mine.packed is not None), key=len, default=None)
        layout = None if longest is None else self.describer.layouts(longest)[tokens[0].layer]
        return kernels.layer(0, layout, scaling, sliding_window, query).unsqueeze(2)

    def _sequence(self, tokens: LayerTokens, exact: tuple[torch.Tensor, ...]) -> np.ndarray:
        """One SEQUENCE record."""
        one = np.zeros(1, SEQUENCE)
        if tokens.packed is not None:
            one = self.describer.packed(tokens.packed, range(tokens.layer, tokens.layer + 1))
        for side, rows in enumerate(exact):
            one["exact"][:, side], one["exact_stride"][:, side] = rows.data_ptr(), rows.stride(0)
        return one
