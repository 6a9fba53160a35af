"""Batches: a row request split into calls, and their replies merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qaq_core.base.errors import OriginalsError
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.base.widths import HALF
from services.originals.wire import MAX_REPLY_BYTES, MAX_ROWS


def split(request: RowRequest, owner: Callable[[bytes], str]) -> list[np.ndarray]:
    """The rows of each call, as indices: the rows of one replica, within the limits of rows and bytes.

    Args:
        owner: names the replica of a page id.
    """
    pages, page_of_row = np.unique(request.page, return_inverse=True)
    owners = np.array([owner(request.page_ids[page]) for page in pages.tolist()])
    of_row = owners[page_of_row]
    sizes = request.payload_bytes()
    parts: list[np.ndarray] = []
    for replica in np.unique(owners):
        rows = np.flatnonzero(of_row == replica)
        fitting = max(1, MAX_REPLY_BYTES // max(1, int(sizes[rows].max())))
        step = min(MAX_ROWS, fitting)
        parts += [rows[start : start + step] for start in range(0, len(rows), step)]
    return parts


def merge(request: RowRequest, parts: Sequence[np.ndarray], replies: Sequence[RowReply]) -> RowReply:
    """The reply to the whole request, with the rows in the order of the request.

    Raises:
        OriginalsError: a reply has another size than its rows, or no numbers.
    """
    found = np.zeros(len(request), dtype=bool)
    sizes = request.payload_bytes()
    for rows, reply in zip(parts, replies, strict=True):
        if len(reply.found) != len(rows) or len(reply.planes) != sizes[rows[reply.found]].sum():
            raise OriginalsError("a cache service sent rows of the wrong size; is it of another version?")
        found[rows] = reply.found
    found_sizes = np.where(found, sizes, 0)
    begins = np.cumsum(found_sizes) - found_sizes
    planes = np.empty(int(found_sizes.sum()), dtype=np.uint8)
    for rows, reply in zip(parts, replies, strict=True):
        present = rows[reply.found]
        source = np.cumsum(sizes[present]) - sizes[present]
        shift = np.repeat(begins[present] - source, sizes[present])
        planes[np.arange(len(reply.planes)) + shift] = reply.planes
    plain = np.flatnonzero(found & (request.want == HALF))
    numbers = planes[begins[plain, None] + np.arange(2 * request.shape.head_dim)].view(np.float16)
    if not np.isfinite(numbers).all():
        raise OriginalsError("a cache service sent rows that hold NaN or infinity")
    return RowReply(found, planes)
