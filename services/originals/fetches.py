"""What a cache service answers to Fetch: checked before anything is made of it."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence

import structlog
from qaq.v1 import originals_pb2 as pb

from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import Page, PageShape
from services.common import metrics
from services.common.errors import InvalidArgument
from services.common.log import once
from services.originals import wire
from services.originals.seals import Seals

log = structlog.get_logger()


async def read_pages(
    replies: AsyncIterable[pb.FetchReply | None], page_ids: Sequence[bytes], shape: PageShape, seals: Seals
) -> list[Page | None]:
    """The pages in the order of their ids; None where one is missing or must not be used.

    Raises:
        InvalidArgument: the replies are not what was asked for.
        OriginalsError: a page has another shape.
    """
    pages: list[Page | None] = []
    page: wire.PageAssembly | None = None
    async for reply in replies:
        if reply is None:  # what gRPC makes of bytes that are no message
            raise InvalidArgument("it is no message of this protocol")
        chunk = reply.chunk
        if page is None:
            if len(pages) == len(page_ids) or chunk.page_id != page_ids[len(pages)]:
                raise InvalidArgument("a page was not asked for")
            if chunk.missing:
                pages.append(None)
                continue
            page = wire.PageAssembly(chunk)
            if page.shape != shape:
                raise OriginalsError(
                    f"a stored page is {page.shape}, not {shape}; do the workers differ in page_tokens?"
                )
        if page.add(chunk):
            pages.append(_usable(page, seals))
            page = None
    if len(pages) < len(page_ids):
        raise InvalidArgument("the stream ended before its last page")
    return pages


def _usable(received: wire.PageAssembly, seals: Seals) -> Page | None:
    """The page, if this model made it and it is as it was made."""
    page = received.page()
    if not seals.fits(received.seal, received.page_id, received.shape, received.data):
        reason = "its seal was made with another secret, under another id or of other data"
    elif not seals.is_own(received.seal):
        reason = "another model made it"
    elif not received.finite:
        reason = "it holds NaN or infinity"
    else:
        return page
    metrics.originals_corrupt.inc()
    if once(f"unusable {page.id.hex()}"):
        log.warning("a stored page is not used; treated as missing", page=page.id.hex(), reason=reason)
    return None
