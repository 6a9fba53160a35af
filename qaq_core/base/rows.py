"""Requests to quantize rows again from their originals, and the answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qaq_core.base.pages import PageShape
from qaq_core.base.widths import HALF


@dataclass(frozen=True)
class RowRequest:
    """n rows to quantize again from their originals, as parallel arrays.

    Attributes:
        page_ids: ids that `page` indexes.
        page: int32 [n]. layer, head, token: int16 [n]; `token` is the place inside the page.
        side: uint8 [n], 0 key, 1 value. position: int32 [n], absolute.
        have, want: uint8 [n], width held and width wanted, see `packing`; HALF asks for all of a row.
        meta: uint8 [n, meta_bytes], the scale bytes the row was quantized with.
    """

    shape: PageShape
    page_ids: tuple[bytes, ...]
    page: np.ndarray
    layer: np.ndarray
    head: np.ndarray
    token: np.ndarray
    side: np.ndarray
    position: np.ndarray
    have: np.ndarray
    want: np.ndarray
    meta: np.ndarray

    def __len__(self) -> int:
        return len(self.page)

    def select(self, index: np.ndarray, page_ids: tuple[bytes, ...] | None = None) -> RowRequest:
        """The same request for some of its rows; with `page_ids`, of those pages and no others it needs."""
        fields = ("page", "layer", "head", "token", "side", "position", "have", "want", "meta")
        rows = {name: getattr(self, name)[index] for name in fields}
        if page_ids is not None:
            used, rows["page"] = np.unique(rows["page"], return_inverse=True)
            rows["page"] = rows["page"].astype(np.int32)
            return RowRequest(self.shape, tuple(page_ids[i] for i in used), **rows)
        return RowRequest(self.shape, self.page_ids, **rows)

    def payload_bytes(self) -> np.ndarray:
        """int64 [n]: bytes of each row in the answer."""
        widths = np.where(self.want == HALF, HALF, self.want.astype(np.int64) - self.have)
        return widths * self.shape.head_dim // 16


@dataclass(frozen=True)
class RowReply:
    """Answer to a `RowRequest`.

    Attributes:
        found: bool [n].
        planes: uint8, the bytes that the found rows lacked, one row after another.
    """

    found: np.ndarray
    planes: np.ndarray
