"""Encoding: originals become rows of a transform, and rows become bytes of a codec.

The torch implementation here runs on any device and defines the result; on a CPU kernels/encode.py computes the same
in C++. Both produce the same bits, since worker and cache service may run different ones and fetched planes must
continue held ones: the products of a row are summed in double precision and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from qaq_core.base.widths import HALF
from qaq_core.quantization.bit_planes import RowLayout, pack_half
from qaq_core.quantization.codecs import Codec
from qaq_core.quantization.transforms import Transform

Layouts = Callable[[int, int], RowLayout]
"""(side, head_dim) -> layout of the side's rows."""


class Encoder(Protocol):
    def rows(
        self, side: int, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[torch.Tensor, int | None]:
        """See `Quantizer.rows`; returns the first layer that is not finite, if any, instead of raising."""
        ...

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """See `Transform.rows_at`."""
        ...

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        """See `Codec.meta`."""
        ...

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
        """Writes the bytes that each row lacks from width `have` to width `want`; all of a row for HALF.

        Args:
            rows: float32 [..., head_dim], n in all. meta: uint8 [n, meta_bytes].
            have, want: uint8 [n], have <= want or want = HALF.
            begin: int64 [n], offset of each row's bytes in `out`, uint8.
        """
        ...


MakeEncoder = Callable[[Transform, Codec, Layouts, torch.device], Encoder]
"""Chooses the encoder of a device. The default is torch; `qaq_core.cache.backends` hands in C++."""


class TorchEncoder:
    def __init__(self, transform: Transform, codec: Codec, layouts: Layouts) -> None:
        self._transform, self._codec, self._layouts = transform, codec, layouts

    def rows(
        self, side: int, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[torch.Tensor, int | None]:
        rows = self._transform.rows(side, originals, start)
        finite = torch.isfinite(rows.sum((1, 2, 3)))
        return rows, None if bool(finite.all()) else int(torch.nonzero(~finite)[0, 0])

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        return self._transform.rows_at(side, originals, layer, head, position)

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        return self._codec.meta(rows, excluded)

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
        rows = rows.reshape(-1, rows.shape[-1])
        kinds = have.long() * 256 + want
        for kind in kinds.unique().tolist():
            mine = torch.nonzero(kinds == kind).squeeze(1)
            made = self._encode(side, rows[mine], meta[mine], kind // 256, kind % 256)
            out[begin[mine][:, None] + torch.arange(made.shape[1], device=rows.device)] = made

    def _encode(self, side: int, rows: torch.Tensor, meta: torch.Tensor, have: int, want: int) -> torch.Tensor:
        head_dim = rows.shape[1]
        scale, offset = self._codec.affine(meta)
        units = rows if offset is None else rows - offset.unsqueeze(-1)
        units = units / spread(scale, head_dim, self._codec.split)
        if want == HALF:
            return pack_half(units)
        layout = self._layouts(side, head_dim)
        return layout.pack(self._codec.codes(units), layout.row_bytes(have), layout.row_bytes(want))


def spread(scale: torch.Tensor, head_dim: int, split: int) -> torch.Tensor:
    """Scales per row [..., 1 or 2] as scales per dim [..., 1 or head_dim]; `split` as in `Codec`."""
    if not split:
        return scale
    first, rest = scale.split(1, -1)
    shape = scale.shape[:-1]
    return torch.cat([first.expand(*shape, 8 * split), rest.expand(*shape, head_dim - 8 * split)], -1)


def torch_encoder(transform: Transform, codec: Codec, layouts: Layouts, device: torch.device) -> Encoder:
    """A `MakeEncoder`."""
    return TorchEncoder(transform, codec, layouts)
