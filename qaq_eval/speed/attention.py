"""Speed of decode attention over one layer's packed tokens, against torch's dense attention.

All backends are timed in one process, in turn. The CPU caches are flushed before each call, as a model's weights do
between the attention of two layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from ctypes import byref, c_int32, c_void_p
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from qaq_core import Quantizer
from qaq_core.attention import CpuAttention, LayerTokens, ReferenceAttention
from qaq_core.base.rope import rotate_pairs
from qaq_core.kernels import LAYER, TYPES, DecodeStep, checked, load_library
from qaq_core.quantization import LinearTransform, ProgressiveCodec, greedy_order
from qaq_core.storage import PackedTokens

MIXED = ((0.60, 2, 2), (0.25, 3, 2), (0.10, 4, 4), (0.05, 8, 8))
"""Shares of tokens and the bits of their keys and values."""
RESIDUAL = 20
"""Tokens that are not packed."""
FLUSH_BYTES = 64 << 20


@dataclass(frozen=True)
class AttentionSpeed:
    """One backend on one shape.

    Attributes:
        shape: query heads/KV heads/head_dim. packing: "mixed", or "dense".
        microseconds: median time of a call. cpu_microseconds: median CPU time, more reliable on a busy machine.
        error: relative, against float64 on the same numbers.
        ratio_to: time of each other backend over the time of this one.
    """

    shape: str
    tokens: int
    backend: str
    packing: str
    microseconds: float
    cpu_microseconds: float
    error: float
    ratio_to: dict[str, float]


@torch.inference_mode()
def attention_speed(
    shape: tuple[int, int, int], tokens: int, repeat: int, report: Callable[[str, float], None] | None = None
) -> list[AttentionSpeed]:
    """Times every backend.

    Args:
        shape: (query heads, KV heads, head_dim).
        repeat: calls of each backend.
    """
    query_heads, heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    if report:
        report(f"packing {tokens} tokens", 0.0)
    packed, exact, keys, values = _state(heads, dim, tokens, generator)
    query = torch.randn(query_heads, 1, dim, generator=generator)
    layer = LayerTokens(0, exact[0], exact[1], 4, packed)
    scaling = dim**-0.5
    codec = packed.quantizer.codec
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    if (library := load_library()) is not None:
        calls["qaq/cpu"] = _DecodeCall(CpuAttention(codec, library), query, layer, scaling)
    reference = ReferenceAttention(codec, torch.device("cpu"))
    calls["qaq/reference"] = lambda: reference(query, layer, scaling)
    calls |= _dense(query, keys, values)
    times: dict[str, list[float]] = {name: [] for name in calls}
    cpu_times: dict[str, list[float]] = {name: [] for name in calls}
    expected = _float64_attention(query, keys, values)
    errors = {
        name: float((call().view(query.shape) - expected).norm() / expected.norm()) for name, call in calls.items()
    }
    flush = torch.zeros(FLUSH_BYTES // 4)
    for i in range(repeat):
        if report:
            report(f"attention {'/'.join(map(str, shape))}", i / repeat)
        for name, call in calls.items():
            flush.add_(1)
            begun, cpu_begun = time.perf_counter(), time.process_time()
            call()
            cpu_times[name].append(time.process_time() - cpu_begun)
            times[name].append(time.perf_counter() - begun)
    micros = {name: median(mine) * 1e6 for name, mine in times.items()}
    return [
        AttentionSpeed(
            shape="/".join(map(str, shape)),
            tokens=tokens,
            backend=name,
            packing="mixed" if name.startswith("qaq/") else "dense",
            microseconds=micros[name],
            cpu_microseconds=median(cpu_times[name]) * 1e6,
            error=errors[name],
            ratio_to={other: micros[other] / micros[name] for other in micros if other != name},
        )
        for name in calls
    ]


class _DecodeCall:
    """The call that a decode step makes for a layer. The tokens are described beforehand. One call writes the new
    token, transforms the queries, attends, and transforms the outputs back."""

    def __init__(self, kernel: CpuAttention, query: torch.Tensor, layer: LayerTokens, scaling: float) -> None:
        assert layer.packed is not None
        self._library, self._records = kernel.library, np.empty(1, LAYER)
        self._alive = kernel.fill(self._records, 0, len(query), layer, None, None), kernel, layer
        self._query = query.contiguous()
        self._keys, self._values = (rows[:, -1].float().contiguous() for rows in (layer.keys, layer.values))
        self._scratch, self._out = torch.empty(len(query), 4 * query.shape[2]), torch.empty(query.shape)
        self._maps = layer.packed.quantizer.transform.maps() or ()
        self._call = DecodeStep(type=TYPES[torch.float32], scaling=scaling, scratch=self._scratch.data_ptr())
        if self._maps:
            self._call.query_map, self._call.output_map = (part.data_ptr() for part in self._maps)
        numbers = 2 * layer.keys.shape[0] * layer.length * query.shape[2]
        self._rest = c_void_p(self._records.ctypes.data), c_int32(1), c_int32(kernel.threads(numbers))

    def __call__(self) -> torch.Tensor:
        call, out = self._call, self._out
        call.query, call.out = self._query.data_ptr(), out.data_ptr()
        call.key, call.value = self._keys.data_ptr(), self._values.data_ptr()
        checked(self._library.qaq_decode, byref(call), *self._rest)  # as a decode step calls it
        return out


def _state(
    heads: int, dim: int, tokens: int, generator: torch.Generator
) -> tuple[PackedTokens, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed tokens of one layer, residual ones [2, heads, RESIDUAL, dim], and all of them as dense keys and values."""
    eye = torch.eye(dim).expand(1, heads, dim, dim)
    pairs = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
    transform = LinearTransform(
        key_matrix=eye.clone(),
        value_matrix=eye.clone(),
        key_mean=torch.randn(1, heads, dim, generator=generator),
        value_mean=torch.randn(1, heads, dim, generator=generator),
        frequencies=(10_000.0**-pairs).unsqueeze(0),
        kind=torch.zeros(1, dtype=torch.long),
    )
    # Octets of decreasing importance, as in a calibrated model.
    order = greedy_order(torch.linspace(0, -3, dim // 8).exp())
    quantizer = Quantizer(transform, ProgressiveCodec([order, order]))
    count = tokens - RESIDUAL
    drawn = torch.rand(1, heads, count, generator=generator)
    borders = torch.tensor([share for share, _, _ in MIXED]).cumsum(0)[:-1]
    kind = torch.bucketize(drawn, borders)
    widths = [torch.tensor([2 * row[side] for row in MIXED], dtype=torch.uint8)[kind] for side in (1, 2)]
    rows = [quantizer.rows(side, torch.randn(1, heads, count, dim, generator=generator), 4) for side in (0, 1)]
    metas = [quantizer.codec.meta(row, None) for row in rows]
    packed = PackedTokens(quantizer, (1, heads, dim), 4, torch.device("cpu"))
    packed.append((widths[0], widths[1]), (rows[0], rows[1]), (metas[0], metas[1]), (None, None))
    exact = torch.randn(2, heads, RESIDUAL, dim, generator=generator).half()
    # The transform's matrices are the identity: a row is the original minus its mean.
    reference = ReferenceAttention(quantizer.codec, torch.device("cpu"))
    mean, angles = transform.center(0, tokens) or (exact, exact)
    centers = (rotate_pairs(mean.unsqueeze(1), angles[4 : 4 + count]), transform.value_mean[0].unsqueeze(1))
    dense = [
        torch.cat([held[:, :4].float(), reference.unpack(packed, side, 0) + centers[side], held[:, 4:].float()], 1)
        for side, held in enumerate(exact)
    ]
    return packed, exact, dense[0], dense[1]


def _float64_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    group = query.shape[0] // keys.shape[0]
    wide_keys, wide_values = (t.double().repeat_interleave(group, 0) for t in (keys, values))
    scores = query.double() @ wide_keys.mT * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ wide_values


def _dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """torch's backends over dense keys and values [kv_heads, tokens, head_dim]."""
    heads, dim = keys.shape[0], keys.shape[2]
    q, k, v = (t.unsqueeze(0) for t in (query, keys, values))
    q16, k16, v16 = (t.bfloat16() for t in (q, k, v))
    grouped, grouped16 = q.view(1, heads, -1, dim), q16.view(1, heads, -1, dim)
    key_codes, key_scale = _int4(k)
    value_codes, value_scale = _int4(v)

    def dequantize() -> torch.Tensor:
        return sdpa(q, _from_int4(key_codes, key_scale), _from_int4(value_codes, value_scale), enable_gqa=True)

    return {
        "sdpa-fp32": lambda: sdpa(q, k, v, enable_gqa=True),
        "sdpa-bf16": lambda: sdpa(q16, k16, v16, enable_gqa=True),
        "grouped-sdpa-fp32": lambda: sdpa(grouped, k, v),
        "grouped-sdpa-bf16": lambda: sdpa(grouped16, k16, v16),
        "grouped-matmul-bf16": lambda: (grouped16 @ k16.mT * dim**-0.5).softmax(-1) @ v16,
        "dequantize-sdpa": dequantize,
    }


def _int4(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 4-bit codes per byte with one scale per vector, as transformers' QuantizedCache holds them."""
    scale = dense.abs().amax(-1, keepdim=True) / 7
    codes = (dense / scale).round().clamp(-7, 7).add(8).to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4), scale


def _from_int4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return (both.float() - 8) * scale


def parse_shapes(shapes: str) -> Sequence[tuple[tuple[int, int, int], int]]:
    """((query heads, KV heads, head_dim), tokens) of "9/3/64/4096,…"."""
    parsed = []
    for one in shapes.split(","):
        numbers = one.split("/")
        if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{one}: query heads/KV heads/head_dim/tokens")
        query_heads, heads, dim, tokens = map(int, numbers)
        if query_heads % heads or dim % 16 or tokens <= RESIDUAL:
            raise ValueError(f"{one}: query heads are a multiple of KV heads, head_dim of 16, tokens over {RESIDUAL}")
        parsed.append(((query_heads, heads, dim), tokens))
    return parsed
