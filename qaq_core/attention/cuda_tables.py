"""What CUDA kernels look up: places of planes, levels for byte picks, scales, angles; see kernels/cuda/levels.h."""

from __future__ import annotations

import torch

from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.kernels.cuda.structures import DEEPER, NEAR, POOLS
from qaq_core.quantization.bit_planes import RowLayout
from qaq_core.quantization.codecs import Codec

GROUP = 4
"""Octets that a warp decodes in one step."""


def refused_codec(codec: Codec) -> str | None:
    """Why the kernels cannot read rows of a codec; None if they can."""
    if codec.meta_bytes != 1 or codec.affine(torch.zeros(1, 1, dtype=torch.uint8))[1] is not None:
        return f"rows of the codec {codec.name}, which have an offset"
    if any(not torch.equal(levels, -levels.flip(0)) for levels in (codec.levels(bits) for bits in range(1, 9))):
        return f"levels of the codec {codec.name}, which are not symmetric"
    return None


def refused_layout(codec: Codec, head_dim: int) -> str | None:
    """Why the kernels cannot read rows of a head_dim; None if they can."""
    if codec.split not in (0, head_dim // 32):
        return f"a first scale for {codec.split} of {head_dim // 8} octets"
    return None


class Tables:
    """Of one codec and head_dim.

    Attributes:
        units: uint8 [2, widths, octets, 8], the place of each plane in a row. A plane that is not held has the place
            of one that is.
        planes: uint8 [2, widths, octets]. deepest: uint8 [2, widths, octets / 4], the most of a group, at most DEEPER.
        pools: uint8 [2, widths, octets, POOLS, 16], low bytes of 8 levels, then their high bytes.
        levels: float16 [9, 256] by planes and code. scales: float32 [256, 2] by meta byte.
    """

    def __init__(self, codec: Codec, layouts: tuple[RowLayout, RowLayout], device: torch.device) -> None:
        octets, widths = layouts[KEY].octets, len(WIDTHS)
        levels = torch.zeros(9, 256)
        for bits in range(1, 9):
            levels[bits] = codec.levels(bits).repeat_interleave(256 >> bits)
        halves = levels.half()
        units = torch.zeros(2, widths, octets, 8, dtype=torch.uint8)
        planes = torch.zeros(2, widths, octets, dtype=torch.uint8)
        pools = torch.zeros(2, widths, octets, POOLS, 16, dtype=torch.uint8)
        for side in (KEY, VALUE):
            layout = layouts[side]
            places = torch.stack([torch.nonzero(layout.order == octet).squeeze(1) for octet in range(octets)])
            for w, width in enumerate(WIDTHS):
                if width == HALF:
                    continue
                units[side, w] = torch.where(places < layout.row_bytes(width), places, 0).to(torch.uint8)
                planes[side, w] = layout.planes[width]
        deepest = planes.view(2, widths, -1, GROUP).amax(-1).clamp_max(DEEPER)
        for side, w, group in torch.nonzero((deepest > 0) & (deepest < DEEPER)).tolist():
            for octet in range(GROUP * group, GROUP * (group + 1)):
                held = int(planes[side, w, octet])
                if held:
                    pools[side, w, octet] = _pools(halves[held], held, int(deepest[side, w, group]))
        scales = codec.affine(torch.arange(256, dtype=torch.uint8).unsqueeze(-1))[0].float().expand(256, 2)
        made = units, planes, deepest, pools, halves, scales.contiguous()
        self.units, self.planes, self.deepest, self.pools, self.levels, self.scales = (x.to(device) for x in made)


def _pools(levels: torch.Tensor, held: int, deepest: int) -> torch.Tensor:
    """Levels of an octet of `held` planes among `deepest`: uint8 [POOLS, 16].

    Up to three planes have all their levels there, deeper ones the sizes: levels of codes whose first bit is 1.
    """
    if deepest <= 3:
        code = torch.arange(8) >> max(0, deepest - held)
        code &= (1 << held) - 1
    else:
        code = (1 << (held - 1)) | (torch.arange(1 << (deepest - 1)) >> (deepest - held))
    raw = levels[code << (8 - held)].contiguous().view(torch.int16).view(-1, 8)
    pools = torch.zeros(POOLS, 16, dtype=torch.uint8)
    pools[: len(raw), :8], pools[: len(raw), 8:] = (raw & 255).to(torch.uint8), ((raw >> 8) & 255).to(torch.uint8)
    return pools


def near_angles(angles: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of 0 to NEAR - 1 positions as a product of matrices wants them.

    Args:
        angles: float32 [>= NEAR, dim], cosines and sines.
    Returns:
        float16 [NEAR / 8, dim / 16, 32, 8]: lane (n, q) of step k has of position 8j + n the numbers 16k + 2q + e + 8r,
        and then what half precision lacks of them.
    """
    dim = angles.shape[1]
    # [j, n, k, r, q, e] -> [j, k, n, q, r, e]
    parts = angles[:NEAR].reshape(NEAR // 8, 8, dim // 16, 2, 4, 2).permute(0, 2, 1, 4, 3, 5)
    parts = parts.reshape(NEAR // 8, dim // 16, 32, 4)
    high = parts.half()
    return torch.cat([high, (parts - high.float()).half()], -1).contiguous()
