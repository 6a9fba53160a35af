"""Hadamard matrices: what mixes dims so that they are alike."""

from __future__ import annotations

import torch


def hadamard(dim: int) -> torch.Tensor:
    """Orthogonal Walsh–Hadamard matrix with random signs [dim, dim], float64.

    In blocks of the largest power of two that divides dim; the signs are the same for every model of that dim.
    """
    block = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    generator = torch.Generator().manual_seed(dim)
    signs = torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1
    return torch.block_diag(*[block * len(block) ** -0.5] * (dim // len(block))) * signs
