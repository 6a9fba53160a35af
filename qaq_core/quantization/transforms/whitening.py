"""Shaping: the matrix that makes a head's vectors cheap to quantize.

Rows y = M·x get noise that is alike in all dims of an octet. With Σ = E[x xᵀ] what the vectors are and F = E[g gᵀ]
what an error in them costs (δᵀ F δ), the best matrix up to a rotation is G^½ with

    G = Σ^-½ · (Σ^½ F Σ^½)^½ · Σ^-½

(G minimises trace(F G⁻¹) · trace(G Σ): rows and noise are balanced in every direction). It is followed by the
rotation that sorts dims by their variance, a Hadamard matrix within each octet, so that its 8 dims are alike and
nearly Gaussian, and a scale that makes every octet's variance 1.
"""

from __future__ import annotations

import torch

from qaq_core.quantization.transforms.hadamard import hadamard

OCTET = 8
FISHER_FLOOR = 0.01
"""Share of the mean cost that every direction has at least: few gradients were seen."""

COVARIANCE_FLOOR = 1e-3
LARGEST = 2.0**14
"""A head whose vectors are all but nothing (a pruned one) keeps them so, where half precision would overflow."""


def whitened(covariance: torch.Tensor, fisher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix of each head, and what errors in its octets cost.

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
