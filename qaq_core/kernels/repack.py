"""Repacking on the CPU in C++ (csrc/repack.h); `storage.repack.TorchRepacker` defines the results."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch

from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.kernels.library import checked
from qaq_core.kernels.structures import Narrow, Repack
from qaq_core.storage.repack import Moves, Rows

_Pointers, _Counts = c_void_p * len(WIDTHS), c_int64 * len(WIDTHS)


class NativeRepacker:
    def __init__(self, library: Any) -> None:
        self._library = library

    def count(self, tags: torch.Tensor, side: int) -> torch.Tensor:
        """See `Repacker`."""
        layers, heads, tokens = tags.shape
        counts = torch.empty(layers, heads, len(WIDTHS), dtype=torch.int64)
        checked(
            self._library.qaq_count,
            c_void_p(tags.data_ptr()),
            c_int64(head_stride(tags)),
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
        held_at, rows_at, held_rows, room = _pointers(held), _pointers(fresh), _counts(held), _counts(fresh)
        job = Repack(
            heads=before.shape[0] * before.shape[1],
            before=before.shape[2],
            after=after.shape[2],
            half_bit=half_bit,
            shift=4 * side,
            tags_before=before.data_ptr(),
            before_stride=head_stride(before),
            tags_after=after.data_ptr(),
            after_stride=head_stride(after),
            held=ctypes.addressof(held_at),
            held_rows=ctypes.addressof(held_rows),
            rows=ctypes.addressof(rows_at),
            room=ctypes.addressof(room),
            moves=len(index),
            index=index.data_ptr(),
            keep=keep.data_ptr(),
            planes=planes.data_ptr(),
            plane_bytes=planes.numel(),
            offsets=offsets.data_ptr(),
        )
        checked(self._library.qaq_repack, ctypes.byref(job))
        return rows

    def narrow(self, held: Rows, half_bit: int, before: torch.Tensor, after: torch.Tensor, side: int) -> Rows:
        """See `Repacker`."""
        counts = self.count(after, side).sum((0, 1)).tolist()
        rows = {
            width: torch.empty(count, width * half_bit, dtype=torch.uint8)
            for width, count in zip(WIDTHS[1:], counts[1:], strict=True)
            if count
        }
        held_at, rows_at, held_rows, room = _pointers(held), _pointers(rows), _counts(held), _counts(rows)
        job = Narrow(
            heads=before.shape[0] * before.shape[1],
            tokens=before.shape[2],
            half_bit=half_bit,
            shift=4 * side,
            before=before.data_ptr(),
            before_stride=head_stride(before),
            after=after.data_ptr(),
            after_stride=head_stride(after),
            held=ctypes.addressof(held_at),
            held_rows=ctypes.addressof(held_rows),
            rows=ctypes.addressof(rows_at),
            room=ctypes.addressof(room),
        )
        checked(self._library.qaq_narrow, ctypes.byref(job))
        return rows


def _pointers(rows: Rows) -> Any:
    """Addresses of the rows of each of WIDTHS; null for widths without rows."""
    return _Pointers(*(rows[width].data_ptr() if width in rows else None for width in WIDTHS))


def _counts(rows: Rows) -> Any:
    return _Counts(*(len(rows[width]) if width in rows else 0 for width in WIDTHS))


def head_stride(tags: torch.Tensor) -> int:
    """Bytes from one head's tags to the next's, in a view of tags with equal distances between heads."""
    layers, heads, tokens = tags.shape
    assert tokens <= 1 or tags.stride(2) == 1
    assert layers <= 1 or heads <= 1 or tags.stride(0) == heads * tags.stride(1)
    return tags.stride(1) if heads > 1 else tags.stride(0)
