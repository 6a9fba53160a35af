"""Repacking on the CPU in C++ (csrc/repack.h); `storage.repack.TorchRepacker` defines what is done."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch

from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.storage.repack import Moves, Rows

_Pointers = c_void_p * len(WIDTHS)


class _Repack(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("runs", "before", "after", "half_bit", "shift")),
        ("tags_before", c_void_p),
        ("before_stride", c_int64),
        ("tags_after", c_void_p),
        ("after_stride", c_int64),
        ("held", c_void_p),
        ("rows", c_void_p),
        ("moves", c_int64),
        *((name, c_void_p) for name in ("index", "keep", "planes", "offsets")),
    ]


class _Narrow(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("runs", "tokens", "half_bit", "shift")),
        ("before", c_void_p),
        ("before_stride", c_int64),
        ("after", c_void_p),
        ("after_stride", c_int64),
        ("held", c_void_p),
        ("rows", c_void_p),
    ]


class NativeRepacker:
    def __init__(self, library: Any) -> None:
        self._library = library

    def count(self, tags: torch.Tensor, side: int) -> torch.Tensor:
        """See `Repacker`."""
        layers, heads, tokens = tags.shape
        counts = torch.empty(layers, heads, len(WIDTHS), dtype=torch.int64)
        self._library.qaq_count(
            c_void_p(tags.data_ptr()),
            c_int64(run_stride(tags)),
            c_int32(layers * heads),
            c_int32(tokens),
            c_int32(4 * side),
            c_void_p(counts.data_ptr()),
        )
        return counts

    def repack(
        self, held: Rows, half_bit: int, before: torch.Tensor, after: torch.Tensor, side: int, moves: Moves
    ) -> Rows:
        """See `Repacker`."""
        counts = self.count(after, side).sum((0, 1)).tolist()
        touched = torch.bincount(torch.cat([moves.have, moves.want]), minlength=HALF + 1).tolist()
        rows, fresh = {}, {}
        for width, count in zip(WIDTHS[1:], counts[1:], strict=True):
            if count and touched[width]:
                rows[width] = fresh[width] = torch.empty(count, width * half_bit, dtype=torch.uint8)
            elif count:
                rows[width] = held[width]
        index, keep, planes, offsets = (t.contiguous() for t in (moves.index, moves.keep, moves.planes, moves.offsets))
        held_at, rows_at = _pointers(held), _pointers(fresh)
        job = _Repack(
            runs=before.shape[0] * before.shape[1],
            before=before.shape[2],
            after=after.shape[2],
            half_bit=half_bit,
            shift=4 * side,
            tags_before=before.data_ptr(),
            before_stride=run_stride(before),
            tags_after=after.data_ptr(),
            after_stride=run_stride(after),
            held=ctypes.addressof(held_at),
            rows=ctypes.addressof(rows_at),
            moves=len(index),
            index=index.data_ptr(),
            keep=keep.data_ptr(),
            planes=planes.data_ptr(),
            offsets=offsets.data_ptr(),
        )
        self._library.qaq_repack(ctypes.byref(job))
        return rows

    def narrow(self, held: Rows, half_bit: int, before: torch.Tensor, after: torch.Tensor, side: int) -> Rows:
        """See `Repacker`."""
        counts = self.count(after, side).sum((0, 1)).tolist()
        rows = {
            width: torch.empty(count, width * half_bit, dtype=torch.uint8)
            for width, count in zip(WIDTHS[1:], counts[1:], strict=True)
            if count
        }
        held_at, rows_at = _pointers(held), _pointers(rows)
        job = _Narrow(
            runs=before.shape[0] * before.shape[1],
            tokens=before.shape[2],
            half_bit=half_bit,
            shift=4 * side,
            before=before.data_ptr(),
            before_stride=run_stride(before),
            after=after.data_ptr(),
            after_stride=run_stride(after),
            held=ctypes.addressof(held_at),
            rows=ctypes.addressof(rows_at),
        )
        self._library.qaq_narrow(ctypes.byref(job))
        return rows


def _pointers(rows: Rows) -> Any:
    """Where the rows of each of WIDTHS are; null for widths without any."""
    return _Pointers(*(rows[width].data_ptr() if width in rows else None for width in WIDTHS))


def run_stride(tags: torch.Tensor) -> int:
    """Bytes from one head's tags to the next's, in a view of tags whose runs stand evenly."""
    layers, heads, tokens = tags.shape
    assert tokens <= 1 or tags.stride(2) == 1
    assert layers <= 1 or heads <= 1 or tags.stride(0) == heads * tags.stride(1)
    return tags.stride(1) if heads > 1 else tags.stride(0)
