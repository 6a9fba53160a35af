"""Requests to quantize rows again from their originals, and the replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qaq_core.base.pages import PageShape
from qaq_core.base.widths import HALF, WIDTHS

ROW_ARRAYS: dict[str, np.dtype] = {
    "layer": np.dtype(np.int16),
    "head": np.dtype(np.int16),
    "position": np.dtype(np.int32),
    "side": np.dtype(np.uint8),
    "have": np.dtype(np.uint8),
    "want": np.dtype(np.uint8),
}
"""The arrays of a request that have one number per row, and their dtypes."""

_IS_WIDTH = np.isin(np.arange(256), WIDTHS)


@dataclass(frozen=True)
class RowRequest:
    """n rows to quantize again from their originals, as parallel arrays.

    A row is one token's key or value in one KV head of one layer. Its address is (layer, head, position) and the
    side; page and place inside the page follow from the position.

    Attributes:
        shape: of the pages that hold the originals.
        page_ids: page number -> 32-byte id, of exactly the pages that hold the rows. Page p holds the positions
            from p * shape.tokens to (p + 1) * shape.tokens - 1.
        layer, head: int16 [n]. position: int32 [n], absolute. side: uint8 [n], KEY or VALUE.
        have, want: uint8 [n], the width a row has and the larger width it wants (`widths`). A row that wants HALF
            gets all its bytes, whatever it has.
        meta: uint8 [n, meta_bytes], the scale bytes that the row was quantized with.

    Raises:
        ValueError: an array has another length or dtype, or a number is out of range; names the array.
    """

    shape: PageShape
    page_ids: Mapping[int, bytes]
    layer: np.ndarray
    head: np.ndarray
    position: np.ndarray
    side: np.ndarray
    have: np.ndarray
    want: np.ndarray
    meta: np.ndarray

    def __post_init__(self) -> None:
        self._check_arrays()
        if len(self):
            self._check_ranges()
        self._check_pages()

    def __len__(self) -> int:
        return len(self.position)

    @property
    def page(self) -> np.ndarray:
        """int32 [n]: number of the page that holds each row."""
        return self.position // np.int32(self.shape.tokens)

    @property
    def token(self) -> np.ndarray:
        """int32 [n]: place of each row's token inside its page."""
        return self.position % np.int32(self.shape.tokens)

    @property
    def offset(self) -> np.ndarray:
        """int64 [n]: byte offset of each row's original in the data of its page."""
        layer, side, head, token = (part.astype(np.int64) for part in (self.layer, self.side, self.head, self.token))
        return np.asarray(self.shape.row_offset(layer, side, head, token))

    def select(self, index: np.ndarray) -> RowRequest:
        """The request for some of the rows (indices or a mask) and the pages that hold them."""
        rows = {name: getattr(self, name)[index] for name in (*ROW_ARRAYS, "meta")}
        pages = np.unique(rows["position"] // self.shape.tokens).tolist()
        return RowRequest(self.shape, {page: self.page_ids[page] for page in pages}, **rows)

    def payload_bytes(self) -> np.ndarray:
        """int64 [n]: bytes of each row in the reply."""
        widths = np.where(self.want == HALF, HALF, self.want.astype(np.int64) - self.have)
        return widths * self.shape.head_dim // 16

    def _check_arrays(self) -> None:
        rows = len(self)
        for name, dtype in ROW_ARRAYS.items():
            array: np.ndarray = getattr(self, name)
            if array.dtype != dtype or array.shape != (rows,):
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)} and must be {dtype} [{rows}]")
        if self.meta.dtype != np.uint8 or self.meta.ndim != 2 or len(self.meta) != rows:
            raise ValueError(
                f"meta is {self.meta.dtype} {list(self.meta.shape)} and must be uint8 [{rows}, meta_bytes]"
            )

    def _check_ranges(self) -> None:
        limits = {"layer": self.shape.layers, "head": self.shape.kv_heads, "side": 2}
        for name, limit in limits.items():
            array: np.ndarray = getattr(self, name)
            if not (int(array.min()) >= 0 and int(array.max()) < limit):
                raise ValueError(f"{name} must be at least 0 and below {limit} in every row")
        if int(self.position.min()) < 0:
            raise ValueError("position must be at least 0 in every row")
        if not (_IS_WIDTH[self.have] & (self.have < HALF)).all():
            raise ValueError(f"have must be one of {WIDTHS[:-1]} (half bits) in every row")
        if not (_IS_WIDTH[self.want] & (self.want > self.have)).all():
            raise ValueError(f"want must be above have, and one of {WIDTHS[1:]} (half bits), in every row")

    def _check_pages(self) -> None:
        needed = set(np.unique(self.page).tolist())
        if needed != self.page_ids.keys():
            page = min(needed ^ self.page_ids.keys())
            has, lacks = ("rows", "id") if page in needed else ("an id", "rows")
            raise ValueError(f"page_ids must have exactly the pages of the rows; page {page} has {has} and no {lacks}")


@dataclass(frozen=True)
class RowReply:
    """Reply to a `RowRequest`.

    Attributes:
        found: bool [n], whether the row's original is stored.
        planes: uint8, the bytes that the found rows lack, one row after another.
    """

    found: np.ndarray
    planes: np.ndarray
