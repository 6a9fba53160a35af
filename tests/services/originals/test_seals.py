"""Seals: whose page it is, and that nobody has changed it."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from qaq_core.base.pages import PageShape
from services.originals.seals import DTYPES, SHAPE_BYTES, Seals, read_shape, shape_bytes
from tests.services.originals.conftest import SHAPE, make_pages

SECRET = "a secret of a deployment"
dims = st.integers(1, (1 << 15) - 1)


def test_a_seal_fits_one_page_of_one_model_and_one_secret() -> None:
    page, other = make_pages(2)
    seals, data = Seals(SECRET, "model"), bytes(page.to_bytes())
    seal = seals.make(page.id, SHAPE, data)
    assert seals.fits(seal, page.id, SHAPE, data)
    assert Seals(SECRET).fits(seal, page.id, SHAPE, data), "a cache service has no model"
    assert seals.is_own(seal)
    assert not Seals(SECRET, "another model").is_own(seal)
    changed = data[:-1] + bytes([data[-1] ^ 1])
    assert not seals.fits(seal, other.id, SHAPE, data)
    assert not seals.fits(seal, page.id, SHAPE, changed)
    assert not seals.fits(seal, page.id, dataclasses.replace(SHAPE, layers=SHAPE.kv_heads, kv_heads=SHAPE.layers), data)
    assert not seals.fits(
        seal._replace(model=Seals(SECRET, "another model").make(page.id, SHAPE, data).model), page.id, SHAPE, data
    )
    for secret in ("", "another secret"):
        assert not Seals(secret, "model").fits(seal, page.id, SHAPE, data)


@given(dims, dims, dims, st.integers(1, 2047), st.sampled_from(DTYPES))
@settings(max_examples=50)
def test_shapes_come_back(layers: int, kv_heads: int, tokens: int, octets: int, dtype: str) -> None:
    shape = PageShape(layers, kv_heads, tokens, 16 * octets, dtype)
    assert read_shape(shape_bytes(shape)) == shape


@given(st.binary(min_size=SHAPE_BYTES, max_size=SHAPE_BYTES))
@settings(max_examples=100)
def test_any_bytes_are_a_shape_or_none(raw: bytes) -> None:
    shape = read_shape(raw)
    assert shape is None or shape_bytes(shape) == raw
