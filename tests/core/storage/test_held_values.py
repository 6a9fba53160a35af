"""Originals that are held rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core import InProcessOriginals
from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import Page, PageShape
from qaq_core.storage import HeldValues, eight_bit_codes, eight_bit_values, half_values, rounded


@given(st.integers(0, 2**32), st.sampled_from([16, 48, 64, 80, 128, 256]), st.floats(1e-20, 1e20))
def test_eight_bits_are_near(seed: int, dim: int, scale: float) -> None:
    """No coordinate of the rotated row is off by more than half a step; so no row by more than that times its root."""
    rows = (np.random.default_rng(seed).standard_normal((20, dim)) * scale).astype(np.float32)
    codes, steps = eight_bit_codes(rows)
    assert codes.dtype == np.int8
    assert np.abs(codes).max() == 127
    error = np.linalg.norm((eight_bit_values(codes, steps) - rows).astype(np.float64), axis=1)
    assert (error <= 0.51 * steps * dim**0.5).all()


def test_an_outlier_does_not_take_all_levels() -> None:
    """One large dimension: the rotation spreads it, and the others keep more of their bits than without."""
    rows = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    rows[:, 5] += 40
    near = eight_bit_values(*eight_bit_codes(rows))
    step = np.abs(rows).max(1, keepdims=True) / 127
    straight = np.rint(rows / step) * step
    assert np.square(near - rows).sum() < 0.1 * np.square(straight - rows).sum()


def test_rows_of_nothing_stay_nothing() -> None:
    codes, steps = eight_bit_codes(np.zeros((3, 16), np.float32))
    assert not eight_bit_values(codes, steps).any()


def test_numbers_stay_numbers_in_half_precision() -> None:
    assert half_values(np.array([1e9, -1e9, 1.0], np.float32)).tolist() == [65504.0, -65504.0, 1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("values", ["float16", "int8"])
def test_what_is_no_number_stays_none(bad: float, values: HeldValues) -> None:
    """So whoever reads it sees that it must not be used; other rows are not touched."""
    data = torch.ones(2, 16)
    data[1, 3] = bad
    near = rounded(data, values)
    assert torch.allclose(near[0], data[0], rtol=0.01)
    assert not torch.isfinite(near[1, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_store_rounds_what_it_is_given(dtype: torch.dtype) -> None:
    shape = PageShape(2, 1, 4, 16, str(dtype).removeprefix("torch."))
    page = Page(bytes(32), shape, torch.randn(shape.dims, generator=torch.Generator().manual_seed(0)).to(dtype))
    for values in ("exact", "float16", "int8"):
        store = InProcessOriginals(values)
        store.put([page])
        (held,) = store.fetch([page.id], shape).result()
        assert held is not None
        assert held.data.dtype == dtype
        assert torch.equal(held.data, rounded(page.data, values))
        kept = values == "exact" or (values == "float16" and dtype != torch.float32)
        assert torch.equal(held.data, page.data) == kept


def test_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="take exact, float16, int8"):
        InProcessOriginals("int4")  # type: ignore[arg-type]
