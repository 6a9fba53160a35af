"""What a codec is: how one row of numbers becomes nested codes."""

from __future__ import annotations

from typing import Protocol

import torch

from qaq_core.base.constants import constant_on


class Codec(Protocol):
    """Turns rows into 8-bit codes whose first b bits are the b-bit code.

    A row is reconstructed as `offset + scale · level`: scale and offset come from the row's (or its
    group's) meta bytes, which never change once measured; the level from a table per number of bits. So one
    attention kernel serves every codec.
    """

    name: str
    meta_bytes: int
    split: int
    """Octets of a row's first scale; the second scale is for the others. 0 where a row has one scale."""

    def order(self, side: int, head_dim: int) -> torch.Tensor:
        """uint8 [head_dim]: the octet of each unit of a row, see `bit_planes.RowLayout`."""
        ...

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
        """Meta bytes of rows.

        Args:
            rows: float32 [layers, kv_heads, tokens, head_dim].
            excluded: bool of the same shape, elements kept elsewhere (outliers), or None.
        Returns:
            uint8 [layers or 1, kv_heads or 1, tokens, meta_bytes]; a 1 where a group spans the dim.
        Raises:
            QuantizationError: a row is beyond the range that the meta bytes can hold.
        """
        ...

    def affine(self, meta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and offset of meta uint8 [..., meta_bytes].

        Returns:
            float32 [..., 1 or 2], see `split`; float32 [...], or None where it is always 0.
        """
        ...

    def codes(self, units: torch.Tensor) -> torch.Tensor:
        """uint8 codes of (row - offset) / scale, same shape."""
        ...

    def levels(self, bits: int) -> torch.Tensor:
        """float32 [2^bits]: the level of each b-bit code, in units of the scale."""
        ...

    def distortion(self, bits: int) -> float:
        """Expected squared error per element at b bits over the squared scale; at 0 bits, of dropping it."""
        ...

    def settings(self) -> dict[str, object]:
        """The arguments of `make_codec` that make the same codec elsewhere."""
        ...


class Cells:
    """Codes by nested cells: a number's code is how many edges are less than it.

    Attributes:
        edges: float32 [255] ascending, on the CPU.
    """

    edges: torch.Tensor

    def codes(self, units: torch.Tensor) -> torch.Tensor:
        """See `Codec`."""
        return torch.bucketize(units, constant_on(self.edges, units.device), out_int32=True).to(torch.uint8)


def part_rms(rows: torch.Tensor, split: int) -> torch.Tensor:
    """Root mean squares of rows [..., head_dim]: float32 [..., 1 or 2], of the octets before and from `split` on.

    Summed in double precision, so that the order does not show.
    """
    parts = (rows[..., : 8 * split], rows[..., 8 * split :]) if split else (rows,)
    return torch.stack([part.double().square().mean(-1).sqrt().float() for part in parts], -1)


def normal_cells(edges: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Centroids of a standard normal in the cells between edges, and the mean squared error of using them.

    Args:
        edges: float64 [n-1] ascending inner cell edges.
    Returns:
        centroids float64 [n], distortion.
    """
    inf = torch.tensor([float("inf")], dtype=torch.float64)
    full = torch.cat([-inf, edges, inf])
    density = torch.exp(-0.5 * full**2) / (2 * torch.pi) ** 0.5
    mass = torch.special.ndtr(full[1:]) - torch.special.ndtr(full[:-1])
    centroids = (density[:-1] - density[1:]) / mass
    return centroids, float(1 - (mass * centroids**2).sum())
