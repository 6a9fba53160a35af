"""Version 3 of a stored page: rows in groups that are compressed one by one, and an index of their sizes.

Behind the 64 bytes of the header is the index: the form of the rows, rows of a group, for each group the size of what
is compressed of it (2 bytes), and a checksum. Then the groups: what is compressed, what is not, and a checksum. So a
row costs one read of some kilobytes. Checksums are keyed BLAKE3 of 8 bytes and are verified before anything is
decompressed; what a group decompresses to has a size that the shape says.

The compressor is zlib's Huffman coder alone: exponents do not repeat, so zstd, which looks for what does, makes them
larger.
"""

from __future__ import annotations

import hmac
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from blake3 import blake3

from qaq_core.base.errors import CorruptPageError
from qaq_core.base.pages import PageShape
from services.originals.page_forms import BY_CODE, Form
from services.originals.seals import Seal

CHECKSUM_BYTES = 8
VERSION = 3
_GROUP_ROWS = 16
_LARGEST_GROUP = 32 << 10
"""Bytes of a group that are compressed, before: their size fits into 2 bytes."""
_RAW = -15
"""Deflate without a header and a checksum."""
_BEGIN = struct.Struct("<BB2x")
_SIZE = np.dtype("<u2")

Data = bytes | bytearray | memoryview


def group_rows(shape: PageShape) -> int:
    """Rows of a group."""
    return max(1, min(_GROUP_ROWS, _LARGEST_GROUP // shape.head_dim))


def index_bytes(shape: PageShape) -> int:
    """Bytes of the index, with its checksum."""
    return _BEGIN.size + _SIZE.itemsize * _groups(shape) + CHECKSUM_BYTES


@dataclass(frozen=True)
class GroupedPage:
    """Where the rows of a page of this version lie, and what they are; the index was verified, or just made.

    Attributes:
        key: 32 bytes, for the checksums of this page.
        first: bytes of the header and the index.
        sizes: of what is compressed of each group.
    """

    shape: PageShape
    seal: Seal
    key: bytes
    form: Form
    first: int
    sizes: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the whole page."""
        return self._starts[-1]

    def span(self, place: int) -> tuple[int, int]:
        """First and last byte of what must be read for a row: of its group and the checksum behind it."""
        number = place // group_rows(self.shape)
        return self._starts[number], self._starts[number + 1] - 1

    def rows(self, places: Sequence[int], stored: Sequence[bytes]) -> list[bytes | None]:
        """Rows as they were put, None where what is stored is not that row.

        Args:
            stored: for each place what lies at its `span`.
        """
        size = group_rows(self.shape)
        groups: dict[tuple[int, int], int] = {}
        which = [
            groups.setdefault((place // size, id(one)), len(groups)) for place, one in zip(places, stored, strict=True)
        ]
        pieces = dict(zip(which, stored, strict=True))
        values = self._open((number, pieces[at]) for at, (number, _) in enumerate(groups))
        read: list[bytes | None] = []
        for place, at in zip(places, which, strict=True):
            group = values[at]
            read.append(None if group is None else group[place % size].tobytes())
        return read

    def data(self, stored: Data) -> memoryview:
        """The data of a whole page.

        Raises:
            CorruptPageError: a group is not as it was put.
        """
        view = memoryview(stored)
        spans = pairwise(self._starts)
        values = self._open((number, view[first:last]) for number, (first, last) in enumerate(spans))
        whole = [value for value in values if value is not None]
        if len(whole) < len(values):
            raise CorruptPageError("rows do not match their checksums")
        return np.concatenate(whole).reshape(-1).data

    def _open(self, groups: Iterable[tuple[int, Data]]) -> list[np.ndarray | None]:
        """Rows, uint8 [rows, row_bytes], of groups by number and stored bytes; None where those are not right."""
        fixed_width, packed_width = self.form.widths(self.shape)
        found: list[int | None] = []
        fixed: list[Data] = []
        packed: list[bytes] = []
        for number, piece in groups:
            rows, size = self._rows_of(number), self.sizes[number]
            exponents: bytes | None = None
            if len(piece) == self._starts[number + 1] - self._starts[number] and self._fits(number, piece):
                exponents = _unpacked(piece[:size], rows * packed_width) if packed_width else b""
            if exponents is None:
                found.append(None)
                continue
            found.append(rows)
            packed.append(exponents)
            fixed.append(piece[size:-CHECKSUM_BYTES])
        count = sum(rows or 0 for rows in found)
        if not count:
            return [None] * len(found)
        joined = self.form.join(
            np.frombuffer(b"".join(fixed), np.uint8).reshape(count, fixed_width),
            np.frombuffer(b"".join(packed), np.uint8).reshape(count, packed_width),
            self.shape,
        )
        ends = np.cumsum([rows or 0 for rows in found]).tolist()
        return [None if rows is None else joined[end - rows : end] for rows, end in zip(found, ends, strict=True)]

    def _fits(self, number: int, piece: Data) -> bool:
        due = _checksum(self._group_key, number, piece[:-CHECKSUM_BYTES])
        return hmac.compare_digest(due, bytes(piece[-CHECKSUM_BYTES:]))

    def _rows_of(self, number: int) -> int:
        size, all_rows = group_rows(self.shape), self.shape.nbytes // self.shape.row_bytes
        return min(size, all_rows - number * size)

    @cached_property
    def _group_key(self) -> bytes:
        return blake3(b"groups", key=self.key).digest()

    @cached_property
    def _starts(self) -> list[int]:
        """Where each group begins, and where the last one ends."""
        fixed = self.form.widths(self.shape)[0]
        rows = [self._rows_of(number) for number in range(len(self.sizes))]
        lengths = np.array(rows) * fixed + np.array(self.sizes, np.int64) + CHECKSUM_BYTES
        return [self.first, *(self.first + np.cumsum(lengths)).tolist()]


def pack(
    shape: PageShape, seal: Seal, form: Form, fixed: np.ndarray, packed: np.ndarray, facts: Data, key: bytes
) -> bytes:
    """A page in this version.

    Args:
        fixed, packed: all rows, split by the form.
        facts: the header.
        key: for the checksums of this page.
    """
    size = group_rows(shape)
    starts = range(0, len(fixed), size)
    parts = [_packed(packed[at : at + size].tobytes()) for at in starts]
    sizes = tuple(len(part) for part in parts)
    index = _BEGIN.pack(form.code, size) + np.array(sizes, _SIZE).tobytes()
    first = len(facts) + index_bytes(shape)
    page = GroupedPage(shape, seal, key, form, first, sizes)
    pieces: list[Data] = [facts, index, _index_checksum(key, index)]
    for number, (at, part) in enumerate(zip(starts, parts, strict=True)):
        body = part + fixed[at : at + size].tobytes()
        pieces += (body, _checksum(page._group_key, number, body))
    return b"".join(pieces)


def read_index(shape: PageShape, seal: Seal, key: bytes, first: int, stored: Data) -> GroupedPage:
    """The page whose index lies behind the first `first` bytes of what is stored.

    Raises:
        CorruptPageError: the index is cut off or does not match its checksum.
    """
    last = first + index_bytes(shape)
    index, checksum = bytes(stored[first : last - CHECKSUM_BYTES]), bytes(stored[last - CHECKSUM_BYTES : last])
    if len(stored) < last or not hmac.compare_digest(_index_checksum(key, index), checksum):
        raise CorruptPageError("the index does not match its checksum")
    code, rows = _BEGIN.unpack_from(index)
    if code not in BY_CODE or rows != group_rows(shape):
        raise CorruptPageError("the index is not of this version")
    sizes = tuple(np.frombuffer(index, _SIZE, offset=_BEGIN.size).tolist())
    return GroupedPage(shape, seal, key, BY_CODE[code], last, sizes)


def _groups(shape: PageShape) -> int:
    return -(-(shape.nbytes // shape.row_bytes) // group_rows(shape))


def _packed(raw: bytes) -> bytes:
    if not raw:
        return b""
    codec = zlib.compressobj(wbits=_RAW, strategy=zlib.Z_HUFFMAN_ONLY)
    return codec.compress(raw) + codec.flush()


def _unpacked(packed: Data, size: int) -> bytes | None:
    """So many bytes, or None; never more memory than they need."""
    codec = zlib.decompressobj(wbits=_RAW)
    try:
        out = codec.decompress(packed, size)
        whole = codec.eof or not codec.decompress(codec.unconsumed_tail, 1)
    except zlib.error:
        return None
    return out if whole and len(out) == size else None


def _checksum(key: bytes, number: int, body: Data) -> bytes:
    return blake3(number.to_bytes(4, "little"), key=key).update(body).digest(CHECKSUM_BYTES)


def _index_checksum(key: bytes, index: bytes) -> bytes:
    return blake3(b"index" + index, key=key).digest(CHECKSUM_BYTES)
