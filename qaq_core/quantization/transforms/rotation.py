"""Rotation: the Karhunen-Loève transform (KLT) of one sequence, applied after the model's linear transform.

The model's matrices come from its calibration, but the vectors of one text are distributed differently. So the rows
of a long sequence are rotated once more. C is the cost of an error in each dim, Σ the covariance of the rows to
quantize, both after the model's transform. The rotation is the eigenvectors U of C^½ Σ C^½, where an error costs the
same in every direction, sorted by variance:

    y' = L·U·R·y,    R = C^½,    L = C^-½ with a scale that makes every octet's variance 1

U is stored as Householder reflections with int8 vectors. A product of reflections is orthogonal whatever their
vectors were rounded to, so queries and outputs are restored exactly, and half a matrix is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qaq_core.base.errors import ConfigError
from qaq_core.quantization.transforms.hadamard import hadamard
from qaq_core.quantization.transforms.whitening import OCTET, octet_means

PRIOR_TOKENS = 64
"""Weight of the model's covariance in a sequence's own, in tokens."""

_MOST = 127


@dataclass(frozen=True)
class Rotation:
    """The rotation of one side's rows (keys or values).

    Attributes:
        reflections: int8 [layers, kv_heads, d·(d+1)/2 - 1], the vectors of d-1 reflections. The i-th leaves the
            first i dims unchanged and so has d-i numbers. A vector of zeros is no reflection.
        before, after: R and L, float32 [layers, kv_heads, octets].
    """

    reflections: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    def __post_init__(self) -> None:
        if self.before.dim() != 3:
            raise ConfigError(f"a rotation's scales are {list(self.before.shape)}, not [layers, kv_heads, octets]")
        layers, heads, dim = self.shape
        if self.reflections.shape != (layers, heads, dim * (dim + 1) // 2 - 1) or self.after.shape != self.before.shape:
            raise ConfigError(f"a rotation of {dim} dims does not have {self.reflections.shape[-1]} numbers")
        if (self.reflections.dtype, self.before.dtype, self.after.dtype) != (
            torch.int8,
            torch.float32,
            torch.float32,
        ):
            raise ConfigError("a rotation has int8 reflections and float32 scales")  # C++ does not check them
        if not all(bool((scales > 0).all() and torch.isfinite(scales).all()) for scales in (self.before, self.after)):
            raise ConfigError("a rotation's scales must be finite and above 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, kv_heads, head_dim)."""
        layers, heads, octets = self.before.shape
        return layers, heads, OCTET * octets

    def to(self, device: torch.device) -> Rotation:
        return Rotation(*(part.to(device) for part in vars(self).values()))

    def matrix(self, layer: int) -> torch.Tensor:
        """U of each head, float64 [kv_heads, head_dim, head_dim].

        With the vectors as the rows of V, a product of reflections is I - Vᵀ·L⁻¹·V. L is the lower triangle of V·Vᵀ,
        its diagonal halved (Schreiber and Van Loan, 1989).
        """
        _, heads, dim = self.shape
        device = self.reflections.device
        vectors = torch.zeros(heads, dim - 1, dim, dtype=torch.float64, device=device)
        row, column = torch.triu_indices(dim - 1, dim, device=device)
        vectors[:, row, column] = self.reflections[layer].double()
        lower = (vectors @ vectors.mT).tril_()
        lower.diagonal(dim1=-2, dim2=-1).clamp_min_(1).div_(2)
        eye = torch.eye(dim, dtype=torch.float64, device=device)
        return eye - vectors.mT @ torch.linalg.solve_triangular(lower, vectors, upper=False)

    def query_map(self, layer: int) -> torch.Tensor:
        """What queries are multiplied with from the right for rotated keys: float64 [kv_heads, head_dim, head_dim]."""
        before, after = self._scales(layer)
        return self.matrix(layer).mT / before.mT / after

    def output_map(self, layer: int) -> torch.Tensor:
        """What sums of rotated values are multiplied with from the right: float64 [kv_heads, head_dim, head_dim]."""
        before, after = self._scales(layer)
        return self.matrix(layer) / after.mT / before

    def rows(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Rotated rows float32 [kv_heads, n, head_dim] of a layer.

        Every reflection is rounded to float32. Products of a float and a whole number are exact in double
        precision, and their sums all but exact, so that a row is the same bits wherever it is made.
        """
        before, after = self._scales(layer)
        rows = rows * before.float()
        for first, vector in self._vectors(layer):
            part = rows[..., first:].double()
            share = (part @ vector.unsqueeze(-1) * 2 / _square(vector).unsqueeze(-1)).float().double()
            rows[..., first:] = (part - share * vector.unsqueeze(-2)).float()
        return rows * after.float()

    def head_rows(self, layer: int, head: int, rows: torch.Tensor) -> torch.Tensor:
        """The same for the rows [n, head_dim] of one head."""
        part = (tensor[layer, None, head, None] for tensor in vars(self).values())
        return Rotation(*part).rows(0, rows.unsqueeze(0))[0]

    def _vectors(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The reflections' vectors float64 [kv_heads, head_dim - first], and the first dim of each."""
        begin, dim = 0, self.shape[2]
        for first in range(dim - 1):
            yield first, self.reflections[layer, :, begin : begin + dim - first].double()
            begin += dim - first

    def _scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """R and L by dim, float64 [kv_heads, 1, head_dim]."""
        before, after = (part[layer].double().repeat_interleave(OCTET, -1) for part in (self.before, self.after))
        return before.unsqueeze(1), after.unsqueeze(1)


def fit_rotation(rows: torch.Tensor, costs: torch.Tensor) -> Rotation:
    """The rotation of a sequence, from its rows.

    Args:
        rows: float32 [layers, kv_heads, n, head_dim], after the model's transform, which makes a typical variance 1.
        costs: float32 [layers, kv_heads, octets], what an error in a dim of an octet costs.
    """
    tokens, dim = rows.shape[2:]
    eye = torch.eye(dim, dtype=torch.float64, device=rows.device)
    products = torch.stack([layer.mT @ layer for layer in rows]).double()
    covariance = (products + PRIOR_TOKENS * eye) / (tokens + PRIOR_TOKENS)
    least = costs.amax(-1, keepdim=True).clamp_min(1e-30) * 1e-9
    before = torch.maximum(costs, least).sqrt()
    weight = before.double().repeat_interleave(OCTET, -1)
    _, vectors = torch.linalg.eigh(weight.unsqueeze(-1) * covariance * weight.unsqueeze(-2))
    mix = torch.block_diag(*[hadamard(OCTET)] * (dim // OCTET)).to(rows.device)
    reflections = _reflections(vectors.flip(-1) @ mix.mT)
    along = _product(reflections, dim) * weight.unsqueeze(-2)
    spread = octet_means(along @ covariance @ along.mT)
    return Rotation(reflections, before, spread.rsqrt().float())


def _square(vectors: torch.Tensor) -> torch.Tensor:
    """Of vectors [..., d]: [..., 1]; 1 for vectors of zeros, which are no reflection."""
    return vectors.square().sum(-1, keepdim=True).clamp_min(1)


def _product(reflections: torch.Tensor, dim: int) -> torch.Tensor:
    """`Rotation.matrix` of every layer, of reflections that `_reflections` made: the first number of each is 127."""
    column, row = torch.triu_indices(dim, dim, device=reflections.device)[:, :-1]
    vectors = reflections.new_zeros(*reflections.shape[:-1], dim, dim, dtype=torch.float64)
    vectors[..., row, column] = reflections.double() / _MOST
    squares = vectors.square().sum(-2)[..., :-1]
    factors = torch.where(squares > 0, 2 / squares.clamp_min(1), 0.0)
    return torch.linalg.householder_product(vectors, factors).mT


def _reflections(vectors: torch.Tensor) -> torch.Tensor:
    """Householder vectors that map the columns of orthogonal matrices [..., d, d] to unit vectors, up to signs."""
    dim = vectors.shape[-1]
    below, factors = torch.geqrf(vectors)
    parts = []
    for first in range(dim - 1):
        vector = below[..., first:, first].clone()
        vector[..., 0] = 1.0
        vector *= (factors[..., first, None] != 0) / vector.abs().amax(-1, keepdim=True)
        parts.append((vector * _MOST).round().to(torch.int8))
    return torch.cat(parts, -1)
