"""Decode attention on the CPU, in C++ behind a plain C interface (native/csrc/attention.h).

It reads the packed pools as they are. What it does not do (several queries at once, outliers) goes to the
reference. Calls release the interpreter lock; scratch is kept per thread, nothing is allocated per call
but the output.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch

from qaq_core import packed as packed_tokens
from qaq_core.attention.reference import LayerTokens, Observer, ReferenceAttention
from qaq_core.codecs import Codec
from qaq_core.native import library
from qaq_core.packed import PackedTokens
from qaq_core.packing import HALF, WIDTHS
from qaq_core.pages import KEY, VALUE
from qaq_core.window import Reduction

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_STATISTICS = {"max": 1, "mean_square": 2}


class _Side(ctypes.Structure):
    _fields_ = [
        ("exact", c_void_p),
        ("exact_head_stride", c_int64),
        ("rows", c_void_p),
        ("meta", c_void_p),
        ("scales", c_void_p),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("affine_head_stride", c_int64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("kv_heads", "group", "dim", "sinks", "recent", "packed", "block_tokens")),
        *((name, c_int32) for name in ("start", "first", "exact_type", "statistic")),
        *((name, c_void_p) for name in ("query", "framed", "mean", "angles", "tags")),
        ("tags_head_stride", c_int64),
        ("levels", c_void_p),
        ("key", _Side),
        ("value", _Side),
        *((name, c_void_p) for name in ("out_exact", "out_packed", "mass", "seen")),
    ]


class CpuAttention:
    """The operation in C++ for one query position."""

    def __init__(self, codec: Codec) -> None:
        loaded = library()
        assert loaded is not None, "see attention.make"
        self._library = loaded
        self._reference = ReferenceAttention(codec, torch.device("cpu"))
        self._levels = torch.zeros(len(WIDTHS), 256)
        for index, width in enumerate(WIDTHS):
            if 0 < width < HALF:
                self._levels[index, : 1 << width] = codec.levels(width)
        # With one meta byte a row, scales are looked up; other codecs' parameters are passed as numbers.
        self._scales = None
        if codec.meta_bytes == 1:
            self._scales = codec.affine(torch.arange(256, dtype=torch.uint8).unsqueeze(-1))[0].contiguous()

    @property
    def name(self) -> str:
        return f"cpu ({self._library.qaq_isa().decode()})"

    def __call__(
        self,
        query: torch.Tensor,
        tokens: LayerTokens,
        scaling: float,
        sliding_window: int | None = None,
        observe: Observer | None = None,
    ) -> torch.Tensor:
        """See `ReferenceAttention`."""
        if not _can(query, tokens, observe):
            return self._reference(query, tokens, scaling, sliding_window, observe)
        query_heads, _, dim = query.shape
        kv_heads, packed, layer = tokens.keys.shape[0], tokens.packed, tokens.layer
        query = (query.float() * scaling).contiguous()
        exact, middle = torch.empty(2, query_heads, 1, dim)
        mass = torch.empty(query_heads, 1)
        call = _Layer(
            kv_heads=kv_heads,
            group=query_heads // kv_heads,
            dim=dim,
            sinks=tokens.sinks,
            recent=tokens.keys.shape[1] - tokens.sinks,
            block_tokens=packed_tokens.BLOCK_TOKENS,
            first=max(0, tokens.length - sliding_window) if sliding_window else 0,
            exact_type=_TYPES[tokens.keys.dtype],
            query=query.data_ptr(),
            levels=self._levels.data_ptr(),
            out_exact=exact.data_ptr(),
            out_packed=middle.data_ptr(),
            mass=mass.data_ptr(),
        )
        for side, rows in ((call.key, tokens.keys), (call.value, tokens.values)):
            side.exact, side.exact_head_stride = rows.data_ptr(), rows.stride(0)
        if isinstance(observe, Reduction):
            call.statistic, call.seen = _STATISTICS[observe.statistic], observe.into.data_ptr()
        if packed is None:
            self._run(call)
            return exact
        framed = packed.quantizer.frame.query(layer, query).contiguous()
        # Scores of means are made for 16 positions at a time.
        center = packed.quantizer.frame.center(layer, packed.stop + 16)
        tags = packed.tags[layer]
        call.packed, call.framed = len(packed), framed.data_ptr()
        call.start = packed.start
        if center is not None:
            call.mean, call.angles = center[0].data_ptr(), center[1].data_ptr()
        call.tags, call.tags_head_stride = tags.data_ptr(), tags.stride(0)
        held = [self._pass(side, index, packed, layer) for index, side in ((KEY, call.key), (VALUE, call.value))]
        self._run(call)
        del held, center
        return packed.quantizer.frame.restore(layer, middle, mass).add_(exact)

    def _pass(self, side: _Side, index: int, packed: PackedTokens, layer: int) -> object:
        """Fills in one side's pools and scales. Returns what must live until the call is over."""
        mine = packed.sides[index]
        pools = [pool.addresses() for pool in mine.pools]
        rows = (c_void_p * len(pools))(*(pool.data_ptr() + layer * pool.stride(0) * 8 for pool in pools))
        side.rows = ctypes.addressof(rows)
        if self._scales is not None:
            meta = mine.meta[min(layer, mine.meta.shape[0] - 1)]
            side.meta, side.scales = meta.data_ptr(), self._scales.data_ptr()
            side.affine_head_stride = meta.stride(0) if meta.shape[0] > 1 else 0
            return rows
        scale, offset = (t.contiguous() for t in packed.affine(index, layer, 0, len(packed)) if t is not None)
        side.scale, side.offset = scale.data_ptr(), offset.data_ptr()
        side.affine_head_stride = scale.stride(0) if scale.shape[0] > 1 else 0
        return rows, scale, offset

    def _run(self, call: _Layer) -> None:
        if self._library.qaq_attend(ctypes.byref(call)):
            raise MemoryError("no memory for the attention kernel's scratch")


def _can(query: torch.Tensor, tokens: LayerTokens, observe: Observer | None) -> bool:
    """Whether the library does this call."""
    packed, keys, values = tokens.packed, tokens.keys, tokens.values
    return (
        query.shape[1] == 1
        and query.shape[2] % 16 == 0
        and keys.dtype == values.dtype
        and keys.dtype in _TYPES
        and all(rows.stride(1) == rows.shape[2] and rows.stride(2) == 1 for rows in (keys, values))
        and (observe is None or isinstance(observe, Reduction))
        and (packed is None or all(side.outliers is None for side in packed.sides))
    )
