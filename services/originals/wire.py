"""Messages of the Originals service to and from the types of qaq_core. Received messages are checked here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from qaq.v1 import originals_pb2 as pb

from qaq_core.base.pages import Page, PageShape
from qaq_core.base.rows import ROW_ARRAYS, RowRequest
from services.common.errors import InvalidArgument
from services.originals.seals import DTYPES, SEAL_PART_BYTES, Seal

PAGE_ID_BYTES = 32
CODEC_ID_BYTES = 16
CHUNK_BYTES = 1 << 20
MAX_PAGE_BYTES = 32 << 20
# A batch of rows: both request and reply stay under gRPC's limit of 4 MB.
MAX_ROWS = 16_384
MAX_REPLY_BYTES = 3_500_000
# RoPE tables are as long as the largest position, so positions are bounded.
MAX_POSITION = 1 << 20
_HOLDER = re.compile(r"[0-9A-Za-z]{0,32}")
_DTYPES_ON_WIRE = {name: dtype.newbyteorder("<") for name, dtype in ROW_ARRAYS.items()}


def shape_message(shape: PageShape) -> pb.PageShape:
    return pb.PageShape(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        tokens=shape.tokens,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
    )


def shape_of(message: pb.PageShape) -> PageShape:
    """Raises InvalidArgument unless it is the shape of a page of at most MAX_PAGE_BYTES."""
    if message.dtype not in DTYPES:
        raise InvalidArgument(f"shape.dtype is {message.dtype!r} and must be one of {', '.join(DTYPES)}")
    for name in ("layers", "kv_heads", "tokens", "head_dim"):
        # int16 arrays index layers, heads and tokens.
        if not 1 <= getattr(message, name) < 1 << 15:
            raise InvalidArgument(f"shape.{name} is {getattr(message, name)} and must be between 1 and 32767")
    if message.head_dim % 16:
        raise InvalidArgument(f"shape.head_dim is {message.head_dim} and must be a multiple of 16")
    shape = PageShape(message.layers, message.kv_heads, message.tokens, message.head_dim, message.dtype)
    if shape.nbytes > MAX_PAGE_BYTES:
        raise InvalidArgument(f"a page of {shape.nbytes:,} bytes is over {MAX_PAGE_BYTES:,}; use fewer page_tokens")
    return shape


def check_page_ids(page_ids: Iterable[bytes]) -> None:
    """Raises InvalidArgument unless each is a page id."""
    for page_id in page_ids:
        if len(page_id) != PAGE_ID_BYTES:
            raise InvalidArgument(f"a page id has {len(page_id)} bytes and must have {PAGE_ID_BYTES}")


def check_holder(holder: str) -> None:
    """Raises InvalidArgument unless it can name a holder."""
    if not _HOLDER.fullmatch(holder):
        raise InvalidArgument("holder must have at most 32 letters and digits; leave it empty to hold nothing")


def page_chunks(page_id: bytes, shape: PageShape, seal: Seal, data: memoryview | bytes) -> Iterator[pb.PageChunk]:
    """A page as chunks of at most 1 MiB; the first carries shape and seal."""
    first: dict[str, Any] = {"shape": shape_message(shape), **seal._asdict()}
    for start in range(0, len(data), CHUNK_BYTES):
        end = start + CHUNK_BYTES
        yield pb.PageChunk(page_id=page_id, data=bytes(data[start:end]), last=end >= len(data), **first)
        first = {}


class PageAssembly:
    """One page while its chunks arrive."""

    def __init__(self, first: pb.PageChunk) -> None:
        """Raises InvalidArgument unless `first` begins a page."""
        check_page_ids([first.page_id])
        if not first.HasField("shape"):
            raise InvalidArgument("the first chunk of a page must carry its shape")
        for name in Seal._fields:
            size = len(getattr(first, name))
            if size != SEAL_PART_BYTES:
                raise InvalidArgument(
                    f"{name} has {size} bytes and must have {SEAL_PART_BYTES} in a page's first chunk"
                )
        self.page_id = first.page_id
        self.shape = shape_of(first.shape)
        self.seal = Seal(first.model, first.mac)
        self.data = bytearray()

    def add(self, chunk: pb.PageChunk) -> bool:
        """Appends a chunk. Returns whether the page is complete.

        Raises:
            InvalidArgument: a chunk of another page, or more or fewer bytes than the shape says.
        """
        if chunk.page_id != self.page_id:
            raise InvalidArgument("a page began before the previous one was complete; its last chunk must say so")
        if len(chunk.data) > CHUNK_BYTES:
            raise InvalidArgument(f"a chunk has {len(chunk.data):,} bytes and at most {CHUNK_BYTES:,} are accepted")
        self.data += chunk.data
        size, due = len(self.data), self.shape.nbytes
        if size > due or (chunk.last and size != due):
            raise InvalidArgument(f"the page has {size:,} bytes and its shape says {due:,}")
        return chunk.last

    def page(self) -> Page:
        return Page.from_bytes(self.page_id, self.shape, self.data)

    @property
    def finite(self) -> bool:
        """Whether a complete page holds neither NaN nor infinity."""
        return finite(self.shape, self.data)


def finite(shape: PageShape, data: bytearray | memoryview) -> bool:
    """Whether the data of a page holds neither NaN nor infinity."""
    values = torch.frombuffer(data, dtype=shape.torch_dtype)
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values))


def codec_chunks(codec_id: bytes, tables: bytes) -> list[pb.PutCodecRequest]:
    """A quantizer's tables as messages of at most 1 MiB; at least one."""
    return [
        pb.PutCodecRequest(codec_id=codec_id, tables=tables[start : start + CHUNK_BYTES])
        for start in range(0, max(len(tables), 1), CHUNK_BYTES)
    ]


def row_request_message(request: RowRequest, codec_id: bytes) -> pb.RequantizeRequest:
    return pb.RequantizeRequest(
        codec_id=codec_id,
        shape=shape_message(request.shape),
        page_ids=request.page_ids,
        meta=request.meta.tobytes(),
        **{name: getattr(request, name).astype(dtype).tobytes() for name, dtype in _DTYPES_ON_WIRE.items()},
    )


def row_request_of(message: pb.RequantizeRequest, meta_bytes: int) -> RowRequest:
    """The request, every number of it in range.

    Raises:
        InvalidArgument: names the field and what it must be.
    """
    shape = shape_of(message.shape)
    page_ids = dict(message.page_ids)
    check_page_ids(page_ids.values())
    rows = len(message.side)
    if rows > MAX_ROWS:
        raise InvalidArgument(f"a batch has {rows:,} rows and at most {MAX_ROWS:,} are accepted; split it")
    arrays = {}
    for name, dtype in _DTYPES_ON_WIRE.items():
        raw = getattr(message, name)
        if len(raw) != rows * dtype.itemsize:
            raise InvalidArgument(f"{name} has {len(raw)} bytes and must have {dtype.itemsize} for each of {rows} rows")
        arrays[name] = np.frombuffer(raw, dtype).astype(ROW_ARRAYS[name], copy=False)
    if len(message.meta) != rows * meta_bytes:
        raise InvalidArgument(f"meta has {len(message.meta)} bytes and must have {meta_bytes} for each of {rows} rows")
    if (arrays["position"] >= MAX_POSITION).any():
        raise InvalidArgument(f"position must be below {MAX_POSITION:,} in every row")
    meta = np.frombuffer(message.meta, np.uint8).reshape(rows, meta_bytes)
    try:
        request = RowRequest(shape, page_ids, meta=meta, **arrays)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error
    reply = int(request.payload_bytes().sum())
    if reply > MAX_REPLY_BYTES:
        raise InvalidArgument(f"the reply would have {reply:,} bytes, over {MAX_REPLY_BYTES:,}; split the batch")
    return request
