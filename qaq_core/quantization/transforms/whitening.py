"""Whitening: the matrix of a head for which quantization noise costs least.

Rows y = M·x get noise of equal variance in all dims of an octet. Σ = E[x xᵀ] is the covariance of the vectors, and
F = E[g gᵀ] the cost of an error in them (δᵀ F δ). The best matrix, up to a rotation, is G^½ with

    G = Σ^-½ · (Σ^½ F Σ^½)^½ · Σ^-½

G minimises trace(F G⁻¹) · trace(G Σ). It is followed by a rotation that sorts dims by variance, a Hadamard matrix
within each octet, which makes its 8 dims alike and nearly Gaussian, and a scale that makes every octet's variance 1.
"""

from __future__ import annotations

import torch

from qaq_core.quantization.transforms.hadamard import hadamard

OCTET = 8
FISHER_FLOOR = 0.01
"""Least cost of a direction, as a share of the mean cost, since only few gradients are measured."""

COVARIANCE_FLOOR = 1e-3
LARGEST = 2.0**14
"""Largest entry of a matrix; that of a pruned head, whose vectors are nearly 0, would overflow half precision."""


def whitened(covariance: torch.Tensor, fisher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix of each head, and the cost of errors in its octets.

    Args:
        covariance, fisher: Σ and F, [..., head_dim, head_dim].
    Returns:
        M float16 [..., head_dim, head_dim]; float32 [..., octets], mean cost of an error in a dim of an octet.
    """
    sigma, cost = _floored(covariance, COVARIANCE_FLOOR), _floored(fisher, FISHER_FLOOR)
    root, inverse = _power(sigma, 0.5), _power(sigma, -0.5)
    balance = _power(inverse @ _power(root @ cost @ root, 0.5) @ inverse, 0.5)
    _, rotation = torch.linalg.eigh(balance @ sigma @ balance)
    dim = sigma.shape[-1]
    mix = torch.block_diag(*[hadamard(OCTET)] * (dim // OCTET)).to(sigma.device)
    matrix = mix @ rotation.flip(-1).mT @ balance
    variance = octet_means(matrix @ sigma @ matrix.mT)
    matrix = matrix / variance.sqrt().repeat_interleave(OCTET, -1).unsqueeze(-1)
    matrix = (matrix / (matrix.abs().amax((-2, -1), keepdim=True) / LARGEST).clamp_min(1.0)).to(torch.float16)
    back = torch.linalg.inv(matrix.double())
    return matrix, octet_means(back.mT @ cost @ back).float()


def octet_means(matrix: torch.Tensor) -> torch.Tensor:
    """Means of the diagonal over octets."""
    return matrix.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, OCTET)).mean(-1)


def _floored(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """float64, with a share of the mean of the diagonal added to it."""
    matrix = matrix.double()
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    return matrix + share * mean[..., None, None] * torch.eye(matrix.shape[-1], dtype=torch.float64).to(matrix.device)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A symmetric positive definite matrix to a power."""
    values, rotation = torch.linalg.eigh(matrix)
    values = values.clamp_min(values.amax(-1, keepdim=True) * 1e-9)
    return (rotation * values.pow(exponent).unsqueeze(-2)) @ rotation.mT
