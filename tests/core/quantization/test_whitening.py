"""Shaping: the best matrix there is for a covariance and a cost, sorted and scaled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.quantization.transforms.whitening import COVARIANCE_FLOOR, FISHER_FLOOR, OCTET, whitened
from tests.core.rows import normal

SIZES = {"dim": st.sampled_from((16, 32, 64, 80)), "seed": st.integers(0, 1 << 20)}


def positive(seed: int, dim: int) -> torch.Tensor:
    """A random symmetric positive matrix whose eigenvalues are some powers of ten apart."""
    rotation = torch.linalg.qr(normal(seed, dim, dim).double())[0]
    return (rotation * torch.logspace(-1.5, 1.5, dim, dtype=torch.float64)) @ rotation.T


def floored(matrix: torch.Tensor, share: float) -> torch.Tensor:
    dim = len(matrix)
    return matrix + share * matrix.trace() / dim * torch.eye(dim, dtype=torch.float64)


def means(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal().view(-1, OCTET).mean(-1)


@given(**SIZES)
def test_octets_have_variance_1_and_the_costs_that_are_told(dim: int, seed: int) -> None:
    covariance, fisher = positive(seed, dim), positive(seed + 1, dim)
    matrix, costs = whitened(covariance, fisher)
    assert (matrix.dtype, costs.shape) == (torch.float16, (dim // OCTET,))
    wide = matrix.double()
    assert torch.allclose(
        means(wide @ floored(covariance, COVARIANCE_FLOOR) @ wide.T),
        torch.ones(dim // OCTET, dtype=torch.float64),
        atol=5e-3,
    )
    back = torch.linalg.inv(wide)
    assert torch.allclose(back @ wide, torch.eye(dim, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(means(back.T @ floored(fisher, FISHER_FLOOR) @ back).float(), costs, rtol=1e-4)


@given(**SIZES)
def test_costs_fall(dim: int, seed: int) -> None:
    _, costs = whitened(positive(seed, dim), positive(seed + 1, dim))
    assert bool((costs[1:] <= 1.02 * costs[:-1]).all())  # half precision turns the axes a little
    assert bool((costs > 0).all())


@given(**SIZES)
def test_dims_of_an_octet_are_alike(dim: int, seed: int) -> None:
    covariance = positive(seed, dim)
    matrix, _ = whitened(covariance, positive(seed + 1, dim))
    variance = (matrix.double() @ floored(covariance, COVARIANCE_FLOOR) @ matrix.double().T).diagonal()
    assert bool(((variance - 1).abs() < 0.02).all())


@given(**SIZES)
def test_no_matrix_balances_rows_and_costs_better(dim: int, seed: int) -> None:
    """trace(F G⁻¹)·trace(G Σ) is at its bound, (trace (Σ^½ F Σ^½)^½)², which no positive G can go below."""
    covariance, fisher = positive(seed, dim), positive(seed + 1, dim)
    matrix, costs = whitened(covariance, fisher)
    sigma, cost = floored(covariance, COVARIANCE_FLOOR), floored(fisher, FISHER_FLOOR)
    # Before octets were scaled an octet's cost was its variance, so the scale was the fourth root of the product.
    balance = matrix.double() * costs.double().pow(0.25).repeat_interleave(OCTET)[:, None]
    own = balance.T @ balance

    def worth(candidate: torch.Tensor) -> float:
        return float((cost @ torch.linalg.inv(candidate)).trace() * (candidate @ sigma).trace())

    singular = torch.linalg.svdvals(torch.linalg.cholesky(sigma).T @ torch.linalg.cholesky(cost))
    assert worth(own) == pytest.approx(float(singular.sum() ** 2), rel=0.02)
    for other in (torch.eye(dim, dtype=torch.float64), torch.linalg.inv(sigma), cost, positive(seed + 2, dim)):
        assert worth(own) < worth(other)
    for i in range(5):
        stretch = torch.linalg.matrix_exp(normal(seed + i, dim, dim).double() / dim)
        assert worth(own) < 1.02 * worth(stretch.T @ own @ stretch)


def test_heads_are_shaped_each_by_itself() -> None:
    some = torch.stack([positive(i, 32) for i in range(12)]).view(2, 2, 3, 32, 32)
    matrices, costs = whitened(some[0], some[1])
    assert (matrices.shape, costs.shape) == ((2, 3, 32, 32), (2, 3, 4))
    matrix, cost = whitened(some[0, 1, 2], some[1, 1, 2])
    assert torch.allclose(costs[1, 2], cost, rtol=1e-2)
    product = matrix.double() @ torch.linalg.inv(matrices[1, 2].double())
    assert torch.allclose(product.abs(), torch.eye(32, dtype=torch.float64), atol=0.05)


@pytest.mark.parametrize("dead", ["covariance", "fisher", "both"])
@pytest.mark.parametrize("size", [0.0, 1e-24])
def test_a_head_without_vectors_or_without_a_say_has_a_frame_too(dead: str, size: float) -> None:
    """A pruned head: its matrix is finite and can be inverted."""
    covariance = positive(0, 32) * (size if dead != "fisher" else 1.0)
    fisher = positive(1, 32) * (size if dead != "covariance" else 1.0)
    matrix, costs = whitened(covariance, fisher)
    assert bool(torch.isfinite(matrix).all())
    assert bool(torch.isfinite(torch.linalg.inv(matrix.double())).all())
    assert bool(torch.isfinite(costs).all())
