"""Messages of the Originals service to and from qaq_core's nouns; what arrives is checked here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from qaq.v1 import originals_pb2 as pb

from qaq_core.base.pages import Page, PageShape
from qaq_core.base.rows import RowRequest
from qaq_core.base.widths import HALF, WIDTHS
from services.common.errors import InvalidArgument

PAGE_ID_BYTES = 32
CODEC_ID_BYTES = 16
PIECE_BYTES = 1 << 20
MAX_PAGE_BYTES = 32 << 20
# A batch of rows: its request and its answer both stay under 4 MB.
MAX_ROWS = 16_384
MAX_ANSWER_BYTES = 3_500_000
# The frames make tables as long as the largest position, so a position is bounded.
MAX_POSITION = 1 << 20
_DTYPES = ("float32", "float16", "bfloat16")
_FIELDS = {
    "page": "<i4",
    "layer": "<i2",
    "head": "<i2",
    "token": "<i2",
    "side": "u1",
    "position": "<i4",
    "have": "u1",
    "want": "u1",
}


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
    if message.dtype not in _DTYPES:
        raise InvalidArgument(f"shape.dtype is {message.dtype!r} and must be one of {', '.join(_DTYPES)}")
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


def page_ids_of(ids: Sequence[bytes]) -> list[bytes]:
    """Raises InvalidArgument unless each is a page id."""
    for i, page_id in enumerate(ids):
        if len(page_id) != PAGE_ID_BYTES:
            raise InvalidArgument(f"page_ids[{i}] has {len(page_id)} bytes and must have {PAGE_ID_BYTES}")
    return list(ids)


def pieces(page_id: bytes, shape: PageShape, data: memoryview | bytes) -> Iterator[pb.PageChunk]:
    """A page as chunks of at most 1 MiB, the first with the shape."""
    for start in range(0, len(data), PIECE_BYTES):
        end = start + PIECE_BYTES
        yield pb.PageChunk(
            page_id=page_id,
            shape=shape_message(shape) if start == 0 else None,
            data=bytes(data[start:end]),
            last=end >= len(data),
        )


class Assembly:
    """One page being put together from its pieces."""

    def __init__(self, first: pb.PageChunk) -> None:
        """Raises InvalidArgument unless `first` begins a page."""
        (self.page_id,) = page_ids_of([first.page_id])
        if not first.HasField("shape"):
            raise InvalidArgument("the first piece of a page must carry its shape")
        self.shape = shape_of(first.shape)
        self.data = bytearray()

    def add(self, chunk: pb.PageChunk) -> bool:
        """Appends a piece. Returns whether the page is complete.

        Raises:
            InvalidArgument: a piece of another page, or more or fewer bytes than the shape says.
        """
        if chunk.page_id != self.page_id:
            raise InvalidArgument("a page began before the one before it was complete (its last piece says so)")
        if len(chunk.data) > PIECE_BYTES:
            raise InvalidArgument(f"a piece has {len(chunk.data):,} bytes and at most {PIECE_BYTES:,} are accepted")
        self.data += chunk.data
        size, due = len(self.data), self.shape.nbytes
        if size > due or (chunk.last and size != due):
            raise InvalidArgument(f"the page has {size:,} bytes and its shape says {due:,}")
        return chunk.last

    def page(self) -> Page:
        return Page.from_bytes(self.page_id, self.shape, self.data)


def codec_pieces(codec_id: bytes, tables: bytes) -> list[pb.PutCodecRequest]:
    """A quantizer's tables as messages of at most 1 MiB; at least one."""
    return [
        pb.PutCodecRequest(codec_id=codec_id, tables=tables[start : start + PIECE_BYTES])
        for start in range(0, max(len(tables), 1), PIECE_BYTES)
    ]


def rows_message(request: RowRequest, codec_id: bytes) -> pb.RequantizeRequest:
    """A batch of rows; only the page ids that its rows name are sent."""
    used, page = np.unique(request.page, return_inverse=True)
    arrays = {name: getattr(request, name) for name in _FIELDS} | {"page": page}
    return pb.RequantizeRequest(
        codec_id=codec_id,
        page_ids=[request.page_ids[i] for i in used],
        shape=shape_message(request.shape),
        meta=request.meta.astype(np.uint8, copy=False).tobytes(),
        **{name: arrays[name].astype(dtype, copy=False).tobytes() for name, dtype in _FIELDS.items()},
    )


def rows_of(message: pb.RequantizeRequest, meta_bytes: int) -> RowRequest:
    """The batch, every array of it in range.

    Raises:
        InvalidArgument: names the field and what it must be.
    """
    shape = shape_of(message.shape)
    ids = tuple(page_ids_of(message.page_ids))
    arrays = {}
    rows = len(message.side)
    if rows > MAX_ROWS:
        raise InvalidArgument(f"a batch has {rows:,} rows and at most {MAX_ROWS:,} are accepted; split it")
    for name, dtype in _FIELDS.items():
        raw = getattr(message, name)
        if len(raw) != rows * np.dtype(dtype).itemsize:
            raise InvalidArgument(f"{name} has {len(raw)} bytes, which is not {dtype} for each of {rows} rows")
        arrays[name] = np.frombuffer(raw, dtype)
    if len(message.meta) != rows * meta_bytes:
        raise InvalidArgument(f"meta has {len(message.meta)} bytes and must have {meta_bytes} for each of {rows} rows")
    limits = {
        "page": len(ids),
        "layer": shape.layers,
        "head": shape.kv_heads,
        "token": shape.tokens,
        "side": 2,
        "position": MAX_POSITION,
        "have": HALF,
        "want": HALF + 1,
    }
    for name, limit in limits.items():
        if rows and not (int(arrays[name].min()) >= 0 and int(arrays[name].max()) < limit):
            raise InvalidArgument(f"{name} must be at least 0 and below {limit} in every row")
    have, want = arrays["have"], arrays["want"]
    if not bool(np.isin(have, WIDTHS).all()):
        raise InvalidArgument(f"have must be one of {WIDTHS[:-1]} (half bits) in every row")
    if not bool((np.isin(want, WIDTHS) & ((want > have) | (want == HALF))).all()):
        raise InvalidArgument(f"want must be above have, and one of {WIDTHS[1:]} (half bits), in every row")
    meta = np.frombuffer(message.meta, np.uint8).reshape(rows, meta_bytes)
    request = RowRequest(shape, ids, meta=meta, **arrays)
    answer = int(request.payload_bytes().sum())
    if answer > MAX_ANSWER_BYTES:
        raise InvalidArgument(f"the answer would have {answer:,} bytes, over {MAX_ANSWER_BYTES:,}; split the batch")
    return request
