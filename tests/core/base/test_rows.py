"""Row requests: complete and in range when they are made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qaq_core.base.pages import PageShape
from qaq_core.base.rows import RowRequest

SHAPE = PageShape(layers=3, kv_heads=2, tokens=4, head_dim=16, dtype="float16")


def make() -> RowRequest:
    """Rows of the pages 0, 2 and 5."""
    return RowRequest(
        SHAPE,
        {0: b"a" * 32, 2: b"b" * 32, 5: b"c" * 32},
        layer=np.array([0, 2, 1, 0], np.int16),
        head=np.array([1, 0, 1, 0], np.int16),
        position=np.array([3, 8, 22, 11], np.int32),
        side=np.array([0, 1, 1, 0], np.uint8),
        have=np.array([0, 2, 4, 8], np.uint8),
        want=np.array([1, 10, 32, 16], np.uint8),
        meta=np.array([[7], [8], [9], [10]], np.uint8),
    )


def test_page_and_place_follow_from_the_position() -> None:
    request = make()
    assert request.page.tolist() == [0, 2, 5, 2]
    assert request.token.tolist() == [3, 0, 2, 3]
    data = np.arange(SHAPE.nbytes // 2).reshape(SHAPE.dims)
    rows = [data[0, 0, 1, 3], data[2, 1, 0, 0], data[1, 1, 1, 2], data[0, 0, 0, 3]]
    assert request.offset.tolist() == [2 * row[0] for row in rows]
    assert request.payload_bytes().tolist() == [1, 8, 32, 8]


def test_offsets_of_large_pages_do_not_overflow() -> None:
    shape = PageShape(layers=100, kv_heads=32, tokens=512, head_dim=256)
    one = np.ones(1, np.uint8)
    last = RowRequest(
        shape,
        {0: bytes(32)},
        layer=np.array([99], np.int16),
        head=np.array([31], np.int16),
        position=np.array([511], np.int32),
        side=one,
        have=0 * one,
        want=one,
        meta=one[:, None],
    )
    assert last.offset.tolist() == [shape.nbytes - shape.row_bytes]


@pytest.mark.parametrize("index", [np.array([3, 1]), np.array([False, True, False, True])])
def test_some_rows_need_only_their_pages(index: np.ndarray) -> None:
    part = make().select(index)
    assert part.page_ids == {2: b"b" * 32}
    assert sorted(part.meta.ravel().tolist()) == [8, 10]
    assert part.position.tolist() == make().position[index].tolist()
    nothing = part.select(np.zeros(2, dtype=bool))
    assert (len(nothing), nothing.page_ids) == (0, {})


BAD = {
    "length": ("layer", np.zeros(3, np.int16), "layer is int16 .3. and must be int16 .4."),
    "dtype": ("position", np.zeros(4, np.int64), "position is int64"),
    "meta": ("meta", np.zeros(4, np.uint8), "meta is"),
    "layer": ("layer", np.array([0, 0, 0, 3], np.int16), "layer must be at least 0 and below 3"),
    "head": ("head", np.array([0, 0, 0, -1], np.int16), "head must be"),
    "side": ("side", np.array([0, 0, 0, 2], np.uint8), "side must be"),
    "position": ("position", np.array([3, 8, 22, -1], np.int32), "position must be"),
    "have": ("have", np.array([0, 2, 4, 9], np.uint8), "have must be one of"),
    "have half precision": ("have", np.array([0, 2, 32, 8], np.uint8), "have must be one of"),
    "want": ("want", np.array([1, 10, 32, 255], np.uint8), "want must be above have"),
    "nothing wanted": ("want", np.array([1, 10, 32, 8], np.uint8), "want must be above have"),
    "page without id": ("position", np.array([3, 8, 22, 12], np.int32), "page 3 has rows and no id"),
    "page without rows": ("position", np.array([3, 8, 11, 11], np.int32), "page 5 has an id and no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_out_of_range_is_refused(name: str) -> None:
    field, value, said = BAD[name]
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(make(), **{field: value})
