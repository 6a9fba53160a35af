"""Encoding on the CPU in C++ (csrc/encode.h); `quantization.encoder.TorchEncoder` defines the results.

Transforms and codecs that the library does not know fall back to torch, and are counted.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qaq_core.base.pages import KEY
from qaq_core.kernels.library import checked
from qaq_core.kernels.structures import TYPES, CellTables, Encode, NativeRotation, Span, TransformTables
from qaq_core.quantization.codecs import Codec, GaussianCodec
from qaq_core.quantization.codecs.base import Cells
from qaq_core.quantization.encoder import Encoder, Layouts
from qaq_core.quantization.transforms import IdentityTransform, LinearTransform, Transform

log = logging.getLogger(__name__)

MAX_DIM = 256
SINGLE_THREAD_BELOW = 1 << 18
"""Below this many numbers one thread is used: waking others takes longer."""
_MOST_BINS = 1 << 15


@dataclass(frozen=True)
class Search:
    """Tables that find a number's cell without branches: bins of equal width, each with one edge at most.

    Attributes:
        edges: float32 [256], the codec's and infinity.
        below: int32 [bins], the number of edges in lower bins.
        low, bins_per_unit: a number x is in bin (x - low) · bins_per_unit, rounded down and clamped.
    """

    edges: torch.Tensor
    below: torch.Tensor
    low: float
    bins_per_unit: float

    @classmethod
    def of(cls, edges: torch.Tensor) -> Search | None:
        """Tables for ascending edges float32 [255]; None if they are so uneven that too many bins are needed."""
        low, bins = edges[0], 256
        while bins <= _MOST_BINS:
            # The same operations as in the library, so that a number equal to an edge gets the edge's bin.
            bins_per_unit = (bins - 1) / (edges[-1] - low)
            place = ((edges - low) * bins_per_unit).int()
            if bool((place[1:] > place[:-1]).all()) and int(place[-1]) < bins:
                below = torch.searchsorted(place, torch.arange(bins, dtype=torch.int32), out_int32=True)
                padded = torch.nn.functional.pad(edges, (0, 1), value=torch.inf)
                return cls(padded, below, float(low), float(bins_per_unit))
            bins *= 2
        return None


class NativeEncoder:
    """`Encoder` in C++.

    Attributes:
        fallbacks: calls that torch did, by reason.
    """

    def __init__(self, library: Any, transform: Transform, codec: Codec, layouts: Layouts, reference: Encoder) -> None:
        self._library, self._reference = library, reference
        self._transform, self._codec, self._layouts = transform, codec, layouts
        self.fallbacks: Counter[str] = Counter()
        # Codecs that override these methods run their own code.
        self._search: Search | None = None
        if isinstance(codec, Cells) and type(codec).codes is Cells.codes:
            self._search = Search.of(codec.edges)
        self._by_rms = isinstance(codec, GaussianCodec) and type(codec).meta is GaussianCodec.meta

    def rows(
        self, side: int, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[torch.Tensor, int | None]:
        """See `Encoder`."""
        linear = self._linear(originals)
        if linear is None:
            return self._reference.rows(side, originals, start, overwrite)
        layers, _, n, _ = originals.shape
        rows = originals if overwrite and originals.dtype == torch.float32 else torch.empty(originals.shape)
        given, alive = _tables(linear, side, start + n)
        bad = checked(
            self._library.qaq_transform,
            ctypes.byref(given),
            ctypes.byref(_span(originals)),
            c_int32(TYPES[originals.dtype]),
            c_int64(start),
            ctypes.byref(_span(rows)),
            _threads(rows),
        )
        del alive
        return rows, bad if bad < layers else None

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """See `Encoder`."""
        linear = self._linear(originals)
        if linear is None or not len(originals) or not _there(linear, layer, head, position):
            return self._reference.rows_at(side, originals, layer, head, position)
        rows, far = torch.empty(originals.shape), linear.angles_far(layer, position) if side == KEY else None
        given, alive = _tables(linear, side, 0 if far is not None else int(position.max()) + 1)
        place = layer * linear.key_mean.shape[1] + head
        if far is not None:  # a table of the rows' own, by row
            kinds, position = torch.zeros(len(linear.kind), dtype=torch.long), torch.arange(len(rows))
            given.angles, given.angles_stride, given.kind, given.kinds = (
                far.data_ptr(),
                far.numel(),
                kinds.data_ptr(),
                1,
            )
            alive = far, kinds
        parts = (originals.float().contiguous(), place, position.contiguous(), place.argsort(), rows)
        checked(
            self._library.qaq_transform_at,
            ctypes.byref(given),
            c_int64(len(rows)),
            *(c_void_p(part.data_ptr()) for part in parts),
        )
        del alive
        return rows

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        """See `Encoder`."""
        codec, dim = self._codec, rows.shape[-1]
        if not self._by_rms or excluded is not None:
            return self._reference.meta(rows, excluded)
        assert isinstance(codec, GaussianCodec)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        rms = torch.empty(*rows.shape[:-1], 2 if codec.split else 1)
        checked(
            self._library.qaq_rms,
            ctypes.byref(_span(rows)),
            c_int32(dim),
            c_int32(8 * codec.split or dim),
            c_void_p(rms.data_ptr()),
            c_int64(rms.numel()),
            _threads(rows),
        )
        return codec.meta_of(rms)

    def encode(
        self,
        side: int,
        rows: torch.Tensor,
        meta: torch.Tensor,
        have: torch.Tensor,
        want: torch.Tensor,
        begin: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See `Encoder`."""
        search, dim = self._search, rows.shape[-1]
        if search is None or dim > MAX_DIM:
            self._fall_back("codes of the codec's own" if search is None else f"a head_dim of {dim}")
            self._reference.encode(side, rows, meta, have, want, begin, out)
            return
        scale, offset = self._codec.affine(meta)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        parts = [scale, offset, have, want, begin, out]
        held = [part if part is None else part.contiguous() for part in parts]
        cells = CellTables(
            dim=dim,
            split=8 * self._codec.split or dim,
            edges=search.edges.data_ptr(),
            below=search.below.data_ptr(),
            low=search.low,
            bins_per_unit=search.bins_per_unit,
            bins=len(search.below),
            units=self._layouts(side, dim).units.data_ptr(),
        )
        at, *others = (part if part is None else part.data_ptr() for part in held)
        job = Encode(cells, _span(rows), at, scale.numel(), *others, out.numel())
        checked(self._library.qaq_encode, ctypes.byref(job), _threads(rows))

    def _linear(self, originals: torch.Tensor) -> LinearTransform | None:
        """The transform, if the library can apply it to these originals."""
        transform, dim = self._transform, originals.shape[-1]
        if type(transform) is IdentityTransform:
            return None  # nothing to do
        if type(transform) is not LinearTransform:
            self._fall_back("rows of the transform's own")
        elif dim > MAX_DIM:
            self._fall_back(f"a head_dim of {dim}")
        elif originals.dtype not in TYPES or originals.stride(-1) != 1:
            self._fall_back(f"{originals.dtype} originals that are not contiguous")
        elif dim == transform.key_mean.shape[-1]:  # otherwise torch raises the error
            return transform
        return None

    def _fall_back(self, why: str) -> None:
        self.fallbacks[why] += 1
        _say(why)


@cache
def _say(why: str) -> None:
    log.warning("the C++ encoder does not take %s: torch operations run instead, more slowly", why)


def _there(transform: LinearTransform, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor) -> bool:
    """Whether the transform has tables for all rows; if not, torch raises the error."""
    layers, heads, _ = transform.key_mean.shape
    limits = ((layer, layers), (head, heads), (position, 1 << 31))
    return all(int(index.min()) >= 0 and int(index.max()) < limit for index, limit in limits)


def _tables(transform: LinearTransform, side: int, stop: int) -> tuple[TransformTables, object]:
    """One side's tables of a transform, for positions before `stop`, and what must live until the call is over."""
    mean, angles = transform.centers(side, stop)
    matrices = transform.matrices[side]
    given = TransformTables(
        layers=mean.shape[0],
        kv_heads=mean.shape[1],
        dim=mean.shape[2],
        kinds=0 if angles is None else len(angles),
        matrices=matrices.data_ptr(),
        means=mean.data_ptr(),
        angles=None if angles is None else angles.data_ptr(),
        angles_stride=0 if angles is None else angles.stride(0),
        kind=transform.kind.data_ptr(),
    )
    if transform.rotation is not None:
        given.rotation = NativeRotation(*(part.data_ptr() for part in vars(transform.rotation[side]).values()))
    return given, angles


def _span(vectors: torch.Tensor) -> Span:
    """Describes [layers, kv_heads, n, head_dim], or [n, head_dim]; a vector is contiguous."""
    vectors = vectors if vectors.dim() == 4 else vectors[None, None]
    return Span(vectors.data_ptr(), *vectors.shape[:3], (c_int64 * 3)(*vectors.stride()[:3]))


def _threads(rows: torch.Tensor) -> c_int32:
    return c_int32(1 if rows.numel() < SINGLE_THREAD_BELOW else torch.get_num_threads())
