"""A batch of rows cut into calls, and the answers put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qaq_core.base.errors import OriginalsError
from qaq_core.base.rows import RowReply, RowRequest
from services.originals.wire import MAX_ANSWER_BYTES, MAX_ROWS


def split(request: RowRequest, owner: Callable[[bytes], str]) -> list[np.ndarray]:
    """Rows of each call, as indices: one owner a call, under the limits of rows and bytes.

    Args:
        owner: names the replica of a page id.
    """
    owners = np.array([owner(page_id) for page_id in request.page_ids])
    _, of_page = np.unique(owners, return_inverse=True)
    of_row = of_page[request.page]
    sizes = request.payload_bytes()
    parts: list[np.ndarray] = []
    for one in np.unique(of_row):
        mine = np.flatnonzero(of_row == one)
        room = max(1, MAX_ANSWER_BYTES // max(1, int(sizes[mine].max())))
        step = min(MAX_ROWS, room)
        parts += [mine[start : start + step] for start in range(0, len(mine), step)]
    return parts


def merge(request: RowRequest, parts: Sequence[np.ndarray], replies: Sequence[RowReply]) -> RowReply:
    """The answer to the whole request, its rows in their order.

    Raises:
        OriginalsError: an answer is not of the size that it must be.
    """
    found = np.zeros(len(request), dtype=bool)
    sizes = request.payload_bytes()
    for rows, reply in zip(parts, replies, strict=True):
        if len(reply.found) != len(rows) or len(reply.planes) != sizes[rows[reply.found]].sum():
            raise OriginalsError("a cache service answered rows of the wrong size; is it of another version?")
        found[rows] = reply.found
    kept = np.where(found, sizes, 0)
    begins = np.cumsum(kept) - kept
    planes = np.empty(int(kept.sum()), dtype=np.uint8)
    for rows, reply in zip(parts, replies, strict=True):
        mine = rows[reply.found]
        source = np.cumsum(sizes[mine]) - sizes[mine]
        shift = np.repeat(begins[mine] - source, sizes[mine])
        planes[np.arange(len(reply.planes)) + shift] = reply.planes
    return RowReply(found, planes)
