"""Rows as bytes: units in an order, prefixes, levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.quantization.bit_planes import (
    LevelTable,
    RowLayout,
    pack_half,
    retagged,
    round_robin,
    tags_of,
    unpack_half,
    widths_of,
)
from tests.core.rows import HEAD_DIMS, normal

CPU = torch.device("cpu")
CODED = [width for width in WIDTHS if width < HALF]
LEVELS = [normal(bits, 1 << bits) for bits in range(1, 9)]


def codes_of(seed: int, rows: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, dim), dtype=torch.uint8, generator=generator)


def order_of(seed: int, dim: int) -> torch.Tensor:
    """Any order in which every octet occurs 8 times."""
    shuffled = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    return round_robin(dim)[shuffled]


def held(order: torch.Tensor, width: int) -> list[int]:
    """Planes of each octet, counted."""
    units = order[: width * len(order) // 16].tolist()
    return [units.count(octet) for octet in range(len(order) // 8)]


def test_a_unit_is_a_plane_of_an_octet_and_bit_j_is_dim_j() -> None:
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, 0] = 0b1000_0001  # planes 0 and 7 of dim 0 of octet 0
    codes[0, 11] = 0b0110_0000  # planes 1 and 2 of dim 3 of octet 1
    order = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1], dtype=torch.uint8)
    packed = RowLayout(order).pack(codes, 0, 16)
    # Octet 0's planes stand at 1 and 4 to 10, octet 1's at 0, 2, 3 and 11 to 15.
    assert packed.tolist() == [[0, 1, 8, 8, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]]


@given(dim=st.sampled_from(HEAD_DIMS))
def test_round_robin_is_plane_after_plane(dim: int) -> None:
    codes = codes_of(dim, 3, dim)
    packed = RowLayout(round_robin(dim)).pack(codes, 0, dim).view(3, 8, dim // 8)
    for plane in range(8):
        bits = ((packed[:, plane, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).view(3, dim)
        assert torch.equal(bits, (codes >> (7 - plane)) & 1)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), rows=st.integers(0, 7))
@pytest.mark.parametrize("width", CODED)
def test_unpacking_gives_the_first_bits_that_a_width_holds(width: int, seed: int, dim: int, rows: int) -> None:
    order, codes = order_of(seed, dim), codes_of(seed, rows, dim)
    layout = RowLayout(order)
    packed = layout.pack(codes, 0, layout.row_bytes(width))
    assert packed.shape == (rows, width * dim // 16)
    planes = held(order, width)
    assert layout.planes[width].tolist() == planes
    bits = torch.tensor(planes).repeat_interleave(8)
    assert torch.equal(layout.unpack(packed).long(), (codes.long() >> (8 - bits)) << (8 - bits))


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), rows=st.integers(0, 7))
@pytest.mark.parametrize("width", CODED)
def test_levels_are_those_of_each_octets_planes_and_0_without_any(width: int, seed: int, dim: int, rows: int) -> None:
    order, codes = order_of(seed, dim), codes_of(seed, rows, dim)
    layout = RowLayout(order)
    out = torch.full((rows, dim), float("nan"))
    LevelTable(LEVELS, layout, CPU).unpack(layout.pack(codes, 0, layout.row_bytes(width)), width, out)
    for octet, bits in enumerate(held(order, width)):
        dims = slice(8 * octet, 8 * octet + 8)
        some = LEVELS[bits - 1][(codes[:, dims] >> (8 - bits)).long()] if bits else torch.zeros(rows, 8)
        assert torch.equal(out[:, dims], some)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), pair=st.tuples(*[st.sampled_from(CODED)] * 2))
def test_a_narrower_row_is_a_prefix_of_a_wider(seed: int, dim: int, pair: tuple[int, int]) -> None:
    """Leaving units out narrows, appending the missing ones widens."""
    layout, codes = RowLayout(order_of(seed, dim)), codes_of(seed, 5, dim)
    have, want = (layout.row_bytes(width) for width in sorted(pair))
    wide = layout.pack(codes, 0, want)
    assert torch.equal(layout.pack(codes, 0, have), wide[:, :have])
    assert torch.equal(layout.pack(codes, have, want), wide[:, have:])


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS))
def test_all_bits_come_back(seed: int, dim: int) -> None:
    layout, codes = RowLayout(order_of(seed, dim)), codes_of(seed, 4, dim)
    packed = layout.pack(codes, 0, dim)
    assert torch.equal(layout.unpack(packed), codes)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS))
def test_rows_that_do_not_stand_together_pack_the_same(seed: int, dim: int) -> None:
    """A view with strides, as a selection or a transpose gives."""
    layout, codes = RowLayout(order_of(seed, dim)), codes_of(seed, 8, dim)
    apart = codes.T.contiguous().T[::2]
    assert torch.equal(layout.pack(apart, 0, dim), layout.pack(codes, 0, dim)[::2])


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS))
def test_half_rows_come_back_as_half_precision(seed: int, dim: int) -> None:
    rows = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed)) * 100
    packed = pack_half(rows)
    assert packed.shape == (3, HALF * dim // 16)
    assert torch.equal(unpack_half(packed), rows.half().float())


@given(seed=st.integers(0, 1 << 30))
def test_tags_name_both_widths(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    every = torch.tensor(WIDTHS, dtype=torch.uint8)
    keys, values, other = (every[torch.randint(0, len(WIDTHS), (2, 40), generator=generator)] for _ in range(3))
    tags = tags_of(keys, values)
    assert torch.equal(widths_of(tags, KEY), keys)
    assert torch.equal(widths_of(tags, VALUE), values)
    assert torch.equal(retagged(tags, KEY, other), tags_of(other, values))
    assert torch.equal(retagged(tags, VALUE, other), tags_of(keys, other))
