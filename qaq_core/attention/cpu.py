"""Attention on the CPU, in C++ behind a plain C interface (kernels/csrc/attention.h, kernels/csrc/prompt.h).

It reads the packed pools as they are, of one layer of a whole batch of sequences in one call, which releases
the interpreter lock. Scratch is kept per thread. A decode step in which it does everything goes through
`NativeStep` instead, with less around each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int32, c_void_p
from typing import Any

import numpy as np
import torch

from qaq_core.allocation.attention_statistics import LayerObserver, Observer, PromptMeans, StepObserver
from qaq_core.attention.fallback import PROMPT, KernelWithFallback, restored_outputs, transformed_queries
from qaq_core.attention.reference import LayerTokens, ReferenceAttention
from qaq_core.kernels import LAYER, REDUCTIONS, TYPES, Describer, Prompt, checked
from qaq_core.quantization.codecs import Codec

SINGLE_THREAD_BELOW = 1 << 19
"""Numbers in keys and values below which one thread does all: waking others would take longer."""


class CpuAttention(KernelWithFallback):
    """The operation in C++: of one query position for a batch of sequences, and of a prompt's queries.

    Attributes:
        describer: tells the library where packed tokens are.
    """

    def __init__(self, codec: Codec, library: Any) -> None:
        super().__init__(ReferenceAttention(codec, torch.device("cpu")), "C++")
        self.library = library
        self.describer = Describer(codec)

    @property
    def name(self) -> str:
        return f"cpu ({self.library.qaq_isa().decode()})"

    def threads(self, numbers: int) -> int:
        """Threads for attention over that many numbers in keys and values."""
        return 1 if numbers < SINGLE_THREAD_BELOW else torch.get_num_threads()

    def decode(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[StepObserver | None],
    ) -> torch.Tensor:
        """See `KernelWithFallback`."""
        # A transform takes queries as [query_heads, n, head_dim]; here n counts sequences.
        query = (query.transpose(0, 1).float() * scaling).contiguous()
        heads, batch, dim = query.shape
        layer, packed = tokens[0].layer, next((mine.packed for mine in tokens if mine.packed is not None), None)
        transforms = [(mine.packed or packed).quantizer.transform for mine in tokens] if packed is not None else []
        asked = transformed_queries(transforms, layer, query) if transforms else query
        exact, middle = torch.empty(2, heads, batch, dim).unbind()
        if transforms and any(mine.packed is None for mine in tokens):
            middle.zero_()
        calls = np.empty(batch, LAYER)
        size, alive = 0, []
        for i, (mine, observe) in enumerate(zip(tokens, observers, strict=True)):
            alive.append(self.fill(calls, i, heads, mine, sliding_window, observe))
            size += 2 * mine.keys.shape[0] * mine.length * dim
        place = np.arange(batch, dtype=np.uintp) * np.uintp(dim * 4)
        for name, rows in (("query", query), ("transformed", asked), ("out_residual", exact), ("out_packed", middle)):
            calls[name] = rows.data_ptr() + place
        calls["stride"] = batch * dim
        checked(self.library.qaq_attend, c_void_p(calls.ctypes.data), c_int32(batch), c_int32(self.threads(size)))
        out = exact.add_(restored_outputs(transforms, layer, middle)) if transforms else exact
        return out.transpose(0, 1).unsqueeze(2)

    def prompt(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None,
        observer: Observer | None,
    ) -> torch.Tensor:
        """See `KernelWithFallback`. What a `LayerObserver` other than `PromptMeans` reads, the reference shows it."""
        given = (tokens, scaling, sliding_window)
        why = self.limits(query, tokens) or (f"{query.dtype} queries" if query.dtype not in TYPES else None)
        if why is not None:
            return self.refer(why, query, *given, observer)
        if observer is None:
            return self._prompt(query, *given, None, 0)
        if not isinstance(observer, LayerObserver):
            return self.refer(PROMPT, query, *given, observer)
        seen, position = observer.prompt, observer.position
        if isinstance(seen, PromptMeans):
            return self._prompt(query, *given, seen, position)
        unread = max(0, seen.reads_from - position)
        if unread == 0:
            return self.refer(PROMPT, query, *given, observer)
        if unread < query.shape[1]:
            self.refer(PROMPT, query[:, unread:], *given, LayerObserver(seen, observer.layer, position + unread))
        return self._prompt(query, *given, None, 0)

    def _prompt(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None,
        seen: PromptMeans | None,
        position: int,
    ) -> torch.Tensor:
        """The operation in C++ for queries from a position on, whose probabilities are added to `seen`."""
        query = query if query.stride(2) == 1 else query.contiguous()
        heads, n, dim = query.shape
        record = np.empty(1, LAYER)
        alive = self.fill(record, 0, heads, tokens, None, None)
        out = torch.empty(n, heads, dim)
        call = Prompt(
            type=TYPES[query.dtype],
            queries=n,
            window=sliding_window or 0,
            scaling=scaling,
            query=query.data_ptr(),
            head_stride=query.stride(0),
            query_stride=query.stride(1),
            out=out.data_ptr(),
        )
        maps = tokens.packed.quantizer.transform.maps() if tokens.packed is not None else None
        if maps is not None:
            call.query_map, call.output_map = (part[tokens.layer].data_ptr() for part in maps)
        if seen is not None:
            sums, peaks = seen.sums[tokens.layer], seen.peaks[tokens.layer]
            call.distance, call.peaks, call.observed_stride = seen.distance, peaks.data_ptr(), peaks.stride(0)
            call.summed = max(0, position + n - max(seen.summed_from, position))
            call.sums = sums.data_ptr() if call.summed else None
        threads = self.threads(heads * n * tokens.length * dim // 8)
        checked(self.library.qaq_prompt, byref(call), c_void_p(record.ctypes.data), c_int32(threads))
        del alive
        return out.transpose(0, 1)

    def fill(
        self,
        calls: np.ndarray,
        i: int,
        query_heads: int,
        tokens: LayerTokens,
        sliding_window: int | None,
        observe: StepObserver | None,
    ) -> object:
        """Describes a layer in the i-th record. Returns what must live until the call is over."""
        keys, values, packed, alive = tokens.keys, tokens.values, tokens.packed, None
        if packed is None:
            calls[i] = self.describer.nothing(1)[0]
        else:
            calls[i] = self.describer.packed(packed).layers[tokens.layer]
            if not self.describer.looks_up:
                alive = self.describer.with_scales(calls[i], packed, tokens.layer)
        call = calls[i]
        heads, exact, dim = keys.shape
        call["kv_heads"], call["group"], call["dim"] = heads, query_heads // heads, dim
        call["sinks"], call["recent"] = tokens.sinks, exact - tokens.sinks
        call["first"] = max(0, tokens.length - sliding_window) if sliding_window else 0
        call["residual_type"] = TYPES[keys.dtype]
        for side, rows in (("key", keys), ("value", values)):
            call[side]["residual"], call[side]["residual_head_stride"] = rows.data_ptr(), rows.stride(0)
        if observe is not None:
            call["reduction"], call["observed"] = REDUCTIONS[observe.reduction], observe.into.data_ptr()
            call["log_sums"] = 0 if observe.log_sums is None else observe.log_sums.data_ptr()
        return alive
