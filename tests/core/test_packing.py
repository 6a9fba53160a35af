"""Bit planes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.packing import HALF, LevelTable, pack, pack_half, unpack_half
from tests.core.rows import HEAD_DIMS, normal


def codes_of(seed: int, rows: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, dim), dtype=torch.uint8, generator=generator)


def levels_of(bits: int) -> torch.Tensor:
    return normal(bits, 1 << bits)


@cache
def table_of(bits: int) -> LevelTable:
    return LevelTable(levels_of(bits))


def test_plane_p_of_dim_8i_plus_j_is_bit_j_of_byte_p_i() -> None:
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, 0] = 0b1000_0001  # planes 0 and 7 of dim 0: bit 0 of byte 0
    codes[0, 11] = 0b0100_0000  # plane 1 of dim 11: bit 3 of byte 1
    packed = pack(codes, 0, 8)
    assert packed.shape == (1, 8, 2)
    assert packed[0, :, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
    assert packed[0, :, 1].tolist() == [0, 8, 0, 0, 0, 0, 0, 0]


@given(
    seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), have=st.integers(0, 8), more=st.integers(0, 8)
)
def test_planes_are_nested(seed: int, dim: int, have: int, more: int) -> None:
    """Leaving planes out narrows, appending the missing ones widens."""
    want = min(8, have + more)
    codes = codes_of(seed, 5, dim)
    wide = pack(codes, 0, want)
    assert torch.equal(pack(codes, 0, have), wide[:, :have])
    assert torch.equal(torch.cat([pack(codes, 0, have), pack(codes, have, want)], 1), wide)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), rows=st.integers(0, 7))
@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_gives_the_level_of_the_first_bits(bits: int, seed: int, dim: int, rows: int) -> None:
    codes = codes_of(seed, rows, dim)
    out = torch.full((rows, dim), float("nan"))
    table_of(bits).unpack(pack(codes, 0, bits), out)
    assert torch.equal(out, levels_of(bits)[(codes >> (8 - bits)).long()])


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS))
def test_half_rows_come_back_as_half_precision(seed: int, dim: int) -> None:
    rows = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed)) * 100
    packed = pack_half(rows)
    assert packed.shape == (3, HALF, dim // 8)
    assert torch.equal(unpack_half(packed), rows.half().float())
