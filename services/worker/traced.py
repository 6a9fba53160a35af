"""A session's originals, whose calls belong to a trace."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from qaq_core import Originals, Quantizer
from qaq_core.base.pages import Page, PageShape
from qaq_core.base.rows import RowReply, RowRequest
from services.common import tracing

if TYPE_CHECKING:
    from opentelemetry.context import Context


class TracedOriginals:
    """A session's originals, whose calls belong to the trace of the generation that has the session.

    A branch of a session shares it.

    Attributes:
        trace: of the generation.
    """

    def __init__(self, originals: Originals) -> None:
        self._originals = originals
        self.trace: Context | None = None
        self.hold, self.forget = originals.hold, originals.forget
        self.rest, self.wake = originals.rest, originals.wake

    @property
    def pending_bytes(self) -> int:
        return self._originals.pending_bytes

    def put(self, pages: Sequence[Page]) -> Future[None]:
        with tracing.within(self.trace):
            return self._originals.put(pages)

    def requantize(self, request: RowRequest, quantizer: Quantizer) -> Future[RowReply]:
        with tracing.within(self.trace):
            return self._originals.requantize(request, quantizer)

    def match(self, page_ids: Sequence[bytes]) -> Future[int]:
        with tracing.within(self.trace):
            return self._originals.match(page_ids)

    def fetch(self, page_ids: Sequence[bytes], shape: PageShape) -> Future[list[Page | None]]:
        with tracing.within(self.trace):
            return self._originals.fetch(page_ids, shape)


def traced(originals: Originals) -> Originals:
    """The originals of a session; as they are without traces."""
    return TracedOriginals(originals) if tracing.on() else originals
