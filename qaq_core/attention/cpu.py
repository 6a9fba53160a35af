"""Decode attention on the CPU, in C++ behind a plain C interface (native/csrc/attention.h).

It reads the packed pools as they are, of one layer of a whole batch of sequences in one call, which releases
the interpreter lock. What it does not do (several queries at once, outliers) goes to the reference, and is
counted. Scratch is kept per thread; nothing is allocated per call but the output.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from functools import cache

import torch

from qaq_core import packed as packed_tokens
from qaq_core.attention.reference import LayerTokens, Observer, ReferenceAttention
from qaq_core.codecs import Codec
from qaq_core.native import library
from qaq_core.packed import PackedTokens
from qaq_core.packing import WIDTHS
from qaq_core.pages import KEY, VALUE
from qaq_core.pool import Pool
from qaq_core.window import Reduction

log = logging.getLogger(__name__)

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_STATISTICS = {"max": 1, "mean_square": 2}
_ALONE = 1 << 19
"""Numbers in keys and values below which one thread does all: others would take longer to wake up."""
_AHEAD = 16
"""Scores of means are made for so many positions at a time."""


class _Rows(ctypes.Structure):
    _fields_ = [("base", c_void_p), ("first", c_void_p)]


class _Side(ctypes.Structure):
    _fields_ = [
        ("exact", c_void_p),
        ("exact_head_stride", c_int64),
        ("rows", c_void_p),
        ("order", c_void_p),
        ("split", c_int32),
        ("parts", c_int32),
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
        ("query", c_void_p),
        ("framed", c_void_p),
        ("stride", c_int64),
        *((name, c_void_p) for name in ("mean", "angles", "tags")),
        ("tags_head_stride", c_int64),
        ("levels", c_void_p),
        ("key", _Side),
        ("value", _Side),
        *((name, c_void_p) for name in ("out_exact", "out_packed", "mass")),
        ("mass_stride", c_int64),
        ("seen", c_void_p),
    ]


class CpuAttention:
    """The operation in C++ for one query position.

    Attributes:
        handed_over: calls that went to the reference, by why. Prompts always do.
    """

    def __init__(self, codec: Codec) -> None:
        loaded = library()
        assert loaded is not None, "see attention.make"
        self._library = loaded
        self._reference = ReferenceAttention(codec, torch.device("cpu"))
        self.handed_over: Counter[str] = Counter()
        self._levels = torch.zeros(9, 256)
        for bits in range(1, 9):
            self._levels[bits, : 1 << bits] = codec.levels(bits)
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
        """See `Attention`."""
        return self.batch(query.unsqueeze(0), [tokens], scaling, sliding_window, [observe])[0]

    def batch(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[Observer | None],
    ) -> torch.Tensor:
        """See `Attention`."""
        reasons = [_why_not(query, mine, observe) for mine, observe in zip(tokens, observers, strict=True)]
        done = [i for i, reason in enumerate(reasons) if reason is None]
        out = torch.empty(query.shape) if len(done) < len(tokens) else None
        for i, reason in enumerate(reasons):
            if reason is not None:
                assert out is not None
                self._hand_over(reason)
                out[i] = self._reference(query[i], tokens[i], scaling, sliding_window, observers[i])
        if not done:
            assert out is not None
            return out
        rest = query if len(done) == len(tokens) else query[done]
        made = self._decode(
            rest.squeeze(2), [tokens[i] for i in done], scaling, sliding_window, [observers[i] for i in done]
        )
        if out is None:
            return made
        out[done] = made
        return out

    def _decode(
        self,
        query: torch.Tensor,
        tokens: Sequence[LayerTokens],
        scaling: float,
        sliding_window: int | None,
        observers: Sequence[Observer | None],
    ) -> torch.Tensor:
        """[batch, query_heads, 1, head_dim] of query [batch, query_heads, head_dim]."""
        # A frame takes queries as [query_heads, n, head_dim]; here n counts sequences.
        query = (query.transpose(0, 1).float() * scaling).contiguous()
        heads, batch, dim = query.shape
        layer, packed = tokens[0].layer, next((mine.packed for mine in tokens if mine.packed is not None), None)
        frame = None if packed is None else packed.quantizer.frame
        framed = query if frame is None else frame.query(layer, query).contiguous()
        exact, middle = torch.empty(2, heads, batch, dim).unbind()
        mass = torch.zeros(heads, batch)
        if frame is not None and any(mine.packed is None for mine in tokens):
            middle.zero_()
        calls = (_Layer * batch)()
        size, alive = 0, []
        for i, (call, mine, observe) in enumerate(zip(calls, tokens, observers, strict=True)):
            at = i * dim * 4
            call.query, call.framed, call.stride = query.data_ptr() + at, framed.data_ptr() + at, batch * dim
            call.out_exact, call.out_packed = exact.data_ptr() + at, middle.data_ptr() + at
            call.mass, call.mass_stride = mass.data_ptr() + i * 4, batch
            alive.append(self._fill(call, heads, mine, sliding_window, observe))
            size += 2 * mine.keys.shape[0] * mine.length * dim
        threads = 1 if size < _ALONE else torch.get_num_threads()
        if self._library.qaq_attend(calls, c_int32(batch), c_int32(threads)):
            raise MemoryError("no memory for the attention kernel's scratch")
        out = exact if frame is None else exact.add_(frame.restore(layer, middle, mass))
        return out.transpose(0, 1).unsqueeze(2)

    def _fill(
        self,
        call: _Layer,
        query_heads: int,
        tokens: LayerTokens,
        sliding_window: int | None,
        observe: Observer | None,
    ) -> object:
        """Describes a layer. Returns what must live until the call is over."""
        keys, values, packed = tokens.keys, tokens.values, tokens.packed
        call.kv_heads, exact, call.dim = keys.shape
        call.group = query_heads // call.kv_heads
        call.sinks, call.recent = tokens.sinks, exact - tokens.sinks
        call.block_tokens = packed_tokens.BLOCK_TOKENS
        call.first = max(0, tokens.length - sliding_window) if sliding_window else 0
        call.exact_type = _TYPES[keys.dtype]
        call.levels = self._levels.data_ptr()
        for side, rows in ((call.key, keys), (call.value, values)):
            side.exact, side.exact_head_stride = rows.data_ptr(), rows.stride(0)
        if isinstance(observe, Reduction):
            call.statistic, call.seen = _STATISTICS[observe.statistic], observe.into.data_ptr()
        if packed is None:
            return None
        layer, tags = tokens.layer, packed.tags
        call.packed, call.start = len(packed), packed.start
        call.tags, call.tags_head_stride = tags.data_ptr() + layer * tags.stride(0), tags.stride(1)
        center = packed.quantizer.frame.center(layer, packed.stop + _AHEAD)
        if center is not None:
            call.mean, call.angles = center[0].data_ptr(), center[1].data_ptr()
        sides = ((KEY, call.key), (VALUE, call.value))
        return center, [self._pass(side, index, packed, layer) for index, side in sides]

    def _pass(self, side: _Side, index: int, packed: PackedTokens, layer: int) -> object:
        """Fills in one side's pools and scales. Returns what must live until the call is over."""
        mine = packed.sides[index]
        rows = (_Rows * len(mine.pools))()
        bases = [_bases(pool) for pool in mine.pools]
        for row, base, pool in zip(rows, bases, mine.pools, strict=True):
            row.base, row.first = ctypes.addressof(base), _part(pool.first, layer)
        side.rows = ctypes.addressof(rows)
        order = packed.quantizer.layout(index, packed.head_dim).order
        side.order, side.split = order.data_ptr(), packed.quantizer.codec.split or packed.head_dim // 8
        if self._scales is not None:
            meta = mine.meta
            side.meta, side.scales = _part(meta, min(layer, meta.shape[0] - 1)), self._scales.data_ptr()
            side.parts = self._scales.shape[1]
            side.affine_head_stride = meta.stride(1) if meta.shape[1] > 1 else 0
            return rows, bases, order
        scale, offset = packed.affine(index, layer, 0, len(packed))
        scale, offset = scale.contiguous(), None if offset is None else offset.contiguous()
        side.scale, side.offset = scale.data_ptr(), None if offset is None else offset.data_ptr()
        side.parts = scale.shape[2]
        side.affine_head_stride = scale.shape[1] if scale.shape[0] > 1 else 0
        return rows, bases, order, scale, offset

    def _hand_over(self, reason: str) -> None:
        self.handed_over[reason] += 1
        if reason != _PROMPT:
            _say(reason)


_PROMPT = "a prompt"


@cache
def _say(reason: str) -> None:
    log.warning("the C++ attention kernel does not take %s: torch operations run instead, more slowly", reason)


def _bases(pool: Pool) -> ctypes.Array[c_void_p]:
    """Where a pool's rows of each of WIDTHS begin."""
    bases = (c_void_p * len(WIDTHS))()
    for width, rows in pool.rows.items():
        bases[WIDTHS.index(width)] = rows.data_ptr()
    return bases


def _part(table: torch.Tensor, index: int) -> int:
    """Address of table[index]."""
    return table.data_ptr() + index * table.stride(0) * table.itemsize


def _why_not(query: torch.Tensor, tokens: LayerTokens, observe: Observer | None) -> str | None:
    """Why the library does not do this call, or None if it does."""
    packed, keys, values = tokens.packed, tokens.keys, tokens.values
    if query.shape[2] != 1 or not (observe is None or isinstance(observe, Reduction)):
        return _PROMPT
    if query.shape[3] % 16 or query.shape[3] > 256:
        return f"a head_dim of {query.shape[3]}"
    if keys.dtype != values.dtype or keys.dtype not in _TYPES:
        return f"{keys.dtype} keys with {values.dtype} values"
    if any(rows.stride(1) != rows.shape[2] or rows.stride(2) != 1 for rows in (keys, values)):
        return "rows that are not contiguous"
    if packed is not None and any(side.outliers is not None for side in packed.sides):
        return "outliers"
    return None
