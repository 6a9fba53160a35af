"""Rows of a decoder layer in C++ and in torch against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from qaq_core.base.errors import KernelError
from qaq_core.kernels import load_library
from qaq_core.kernels.dense import GATES, MOST_ROWS, NativeDense
from qaq_core.models.dense import TorchDense
from tests.core.conformance import forced, kernels

IMPLEMENTATIONS = tuple(kernel for kernel in kernels() if kernel != "triton")


@pytest.fixture(params=IMPLEMENTATIONS)
def dense(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "reference":
        yield TorchDense()
        return
    with forced(request.param):
        yield NativeDense(load_library())


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool(((got.double() - want).norm() / want.norm()) < 1e-6)


def randn(*dims: int) -> torch.Tensor:
    return torch.randn(*dims, generator=torch.Generator().manual_seed(sum(dims)))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 12, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, (1,)), (96, (64, 16, 16)), (576, (97, 8, 150))])
def test_products(dense: Any, rows: int, inputs: int, outputs: tuple[int, ...]) -> None:
    x = randn(rows, inputs)
    weights = [(randn(n, inputs), randn(n) if i % 2 else None) for i, n in enumerate(outputs)]
    want = torch.cat(
        [functional.linear(x.double(), w.double(), None if b is None else b.double()) for w, b in weights], 1
    )
    assert close(dense.linear(weights)(x), want)


@pytest.mark.parametrize("size", [16, 48, 576])
def test_norms(dense: Any, size: int) -> None:
    x, added, weight = randn(3, size), randn(size, 3).T.contiguous(), randn(size)
    moved = x.double() + added.double()
    want = moved / (moved.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    alone = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert close(dense.norm(x, weight, 1e-5), alone)
    assert close(dense.norm(x, weight, 1e-5, added), want)
    assert close(x, moved)


@pytest.mark.parametrize("dim", [16, 64, 80, 256])
@pytest.mark.parametrize("normed", [False, True])
def test_rotations(dense: Any, dim: int, normed: bool) -> None:
    joint = randn(3, (4 + 2 * 2) * dim)
    angles = torch.rand(3, dim // 2).repeat(1, 2) * 100
    table = angles.cos(), angles.sin()
    norms = (randn(dim), randn(dim).flip(0)) if normed else None
    got = dense.rotate(joint, (4, 2, dim), norms, 1e-6, table)
    parts = list(joint.double().view(3, -1, dim).split([4, 2, 2], 1))
    for i in range(2):
        x = parts[i]
        if norms is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norms[i].double()
        low, high = x.chunk(2, -1)
        cos, sin = (part.double()[:, None] for part in table)
        parts[i] = x * cos + torch.cat([-high, low], -1) * sin
    for mine, want in zip(got, parts, strict=True):
        assert mine.shape == want.shape
        assert close(mine, want)


@pytest.mark.parametrize("kind", GATES)
def test_gates(dense: Any, kind: str) -> None:
    both = torch.cat([torch.linspace(-110, 110, 4 * 96).view(4, 96), randn(4, 96)], 1)
    x, up = both.double().chunk(2, 1)
    want = (functional.silu(x) if kind == "silu" else functional.gelu(x, approximate="tanh")) * up
    got = dense.gate(both, kind)
    assert close(got, want)
    assert torch.allclose(got.double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")
def test_what_does_not_fit_is_refused() -> None:
    dense = NativeDense(load_library())
    with pytest.raises(KernelError):
        dense.norm(randn(2, 24), randn(24), 1e-6)
    with pytest.raises(KernelError):
        dense.linear([(randn(8, 24), None)])(randn(2, 24))
    with pytest.raises(KernelError):
        dense.gate(randn(2, 40), "silu")
    with pytest.raises(KernelError):
        dense.rotate(randn(2, 6 * 8), (2, 2, 8), None, 1e-6, (randn(2, 8), randn(2, 8)))
