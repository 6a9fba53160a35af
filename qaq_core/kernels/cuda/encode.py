"""Encoding on a GPU: rows of all layers at once, a sequence's rotation in one launch, and all rows' bytes in another.

The rest is another encoder's. Products are in double precision and rounded once, as everywhere.
"""

from __future__ import annotations

import torch

from qaq_core.base.pages import KEY
from qaq_core.base.rope import rotate_pairs
from qaq_core.kernels.cuda.launcher import Launcher
from qaq_core.kernels.cuda.structures import HEAD_DIMS, EncodeArgs, RotateArgs
from qaq_core.quantization import Codec, Encoder, MakeEncoder, Transform
from qaq_core.quantization.codecs.base import Cells
from qaq_core.quantization.encoder import Layouts
from qaq_core.quantization.transforms import LinearTransform, Rotation

THREADS, ROWS = 128, 16
"""Of a block of `rotate`; `encode` has as many threads, and a row a warp."""
AT_ONCE = 1 << 26
"""Numbers in double precision that are made at a time."""


class CudaEncoder:
    """See `Encoder`.

    Args:
        other: does what is not done here.
    """

    def __init__(
        self,
        launcher: Launcher,
        transform: Transform,
        codec: Codec,
        layouts: Layouts,
        device: torch.device,
        other: Encoder,
    ) -> None:
        self._launcher, self._transform, self._codec, self._layouts = launcher, transform, codec, layouts
        self.rows_at, self.meta = other.rows_at, other.meta
        self._other, self._device = other, device
        # Codecs that override these methods run their own code.
        self._edges: torch.Tensor | None = None
        if isinstance(codec, Cells) and type(codec).codes is Cells.codes and codec.meta_bytes == 1:
            scales, offset = codec.affine(torch.arange(256, dtype=torch.uint8).unsqueeze(-1))
            if offset is None:
                self._edges = codec.edges.to(device)
                self._scales = scales.float().expand(256, 2).contiguous().to(device)
        self._places: dict[tuple[int, int], torch.Tensor] = {}

    def rows(
        self, side: int, originals: torch.Tensor, start: int, overwrite: bool = False
    ) -> tuple[torch.Tensor, int | None]:
        """See `Encoder`."""
        linear = self._transform
        if not isinstance(linear, LinearTransform) or originals.shape[-1] not in HEAD_DIMS:
            return self._other.rows(side, originals, start, overwrite)
        rows = _before_rotation(linear, side, originals, start)
        if linear.rotation is not None:
            self._rotate(linear.rotation[side], rows)
        finite = torch.isfinite(rows.sum((1, 2, 3)))
        return rows, None if bool(finite.all()) else int(torch.nonzero(~finite)[0, 0])

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
        dim, count = rows.shape[-1], len(want)
        if self._edges is None or dim not in HEAD_DIMS:
            return self._other.encode(side, rows, meta, have, want, begin, out)
        if (side, dim) not in self._places:
            self._places[side, dim] = self._layouts(side, dim).units.to(torch.uint8).to(self._device)
        given = [part.contiguous() for part in (rows, meta, have, want, begin)]
        args = EncodeArgs(
            *(part.data_ptr() for part in (*given, out, self._edges, self._scales, self._places[side, dim]))
        )
        args.count, args.split = count, self._codec.split
        if count:
            self._launcher.launch("encode", dim, (-(-count // 4), 1, 1), THREADS, args)
        return None

    def _rotate(self, rotation: Rotation, rows: torch.Tensor) -> None:
        """Rotates rows [layers, kv_heads, tokens, head_dim] in place."""
        layers, heads, tokens, dim = rows.shape
        given = (rows, rotation.reflections, rotation.before, rotation.after)
        assert all(part.is_contiguous() for part in given)
        args = RotateArgs(*(part.data_ptr() for part in given), tokens)
        if tokens:
            self._launcher.launch("rotate", dim, (-(-tokens // ROWS), layers * heads, 1), THREADS, args)


def _before_rotation(linear: LinearTransform, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
    """Centered originals times the matrices of their heads, float32."""
    layers, heads, tokens, dim = originals.shape
    rows = torch.empty(originals.shape, device=originals.device)
    mean, angles = linear.centers(side, start + tokens)
    step = max(1, AT_ONCE // max(1, heads * tokens * dim))
    for first in range(0, layers, step):
        part = slice(first, min(layers, first + step))
        center = mean[part].unsqueeze(2)
        if side == KEY and angles is not None:
            mine = torch.stack([angles[kind, start : start + tokens] for kind in linear.kinds[part]])
            center = rotate_pairs(center, mine.unsqueeze(1))
        centered = (originals[part].float() - center).double()
        rows[part] = centered @ linear.matrices[side][part].double()
    return rows


def cuda_encoders(launcher: Launcher, device: torch.device, other: MakeEncoder) -> MakeEncoder:
    """A `MakeEncoder` that makes these for a device, and others for the host."""

    def make(transform: Transform, codec: Codec, layouts: Layouts, place: torch.device) -> Encoder:
        made = other(transform, codec, layouts, place)
        return CudaEncoder(launcher, transform, codec, layouts, place, made) if place == device else made

    return make
