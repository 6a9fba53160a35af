"""Pages: layout, bytes and names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qaq_core.base.pages import Page, PageShape, page_id
from tests.core.rows import normal


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_and_back(dtype: str) -> None:
    shape = PageShape(2, 3, 4, 16, dtype)
    page = Page(b"x" * 32, shape, normal(0, *shape.dims).to(shape.torch_dtype))
    raw = bytes(page.to_bytes())
    assert len(raw) == shape.nbytes
    again = Page.from_bytes(page.id, shape, raw)
    assert again.data.dtype == shape.torch_dtype
    assert torch.equal(again.data, page.data)


def test_a_rows_offset_finds_its_bytes() -> None:
    shape = PageShape(2, 3, 4, 16)
    page = Page(b"", shape, normal(0, *shape.dims))
    raw = bytes(page.to_bytes())
    for place in np.ndindex(*shape.dims[:4]):
        layer, side, head, token = place
        at = shape.row_offset(layer, side, head, token)
        row = np.frombuffer(raw[at : at + shape.row_bytes], dtype=np.float32)
        assert np.array_equal(row, page.data[place].numpy())


def test_a_name_depends_on_everything_it_is_made_of() -> None:
    parts = {
        "model_fingerprint": "m",
        "dtype": "float32",
        "salt": b"s",
        "parent": b"p",
        "token_ids": [1, 2],
    }
    other = {
        "model_fingerprint": "n",
        "dtype": "float16",
        "salt": b"t",
        "parent": b"q",
        "token_ids": [2, 1],
    }
    names = {page_id(**parts)} | {page_id(**{**parts, key: value}) for key, value in other.items()}  # type: ignore[arg-type]
    assert len(names) == 6
    assert page_id(**parts) in names  # type: ignore[arg-type]
    assert all(len(name) == 32 for name in names)


def test_parts_do_not_run_into_each_other() -> None:
    assert page_id("ab", "c", b"", b"", []) != page_id("a", "bc", b"", b"", [])
    assert page_id("a", "b", b"c", b"", [1]) != page_id("a", "b", b"", b"c", [1])
