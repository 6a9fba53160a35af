"""The stored form of a page: a header, and rows with checksums.

The header has 64 bytes, little-endian: magic, version, shape, seal, checksum. Every version has the same header, so
that a release knows the pages of another one from damaged ones. In version 3 the rows are compressed in groups
([page_groups.py](page_groups.py)). In version 2, plain pages, each row has its checksum behind it. That checksum of a
row is 8 bytes: a universal hash of the row (multilinear, Lemire and Kaser 2014, two lanes of 32 bits) under a mask of
the row's own, the construction of Wegman and Carter. Numpy computes it for all rows of a page at once. The keys and
masks of a page are BLAKE3's output for the deployment's secret, the page's id and the header, whose seal depends on all
rows; so no key serves two contents, no checksum fits other rows, places or pages, and without the secret nobody can
make one.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from blake3 import blake3

from qaq_core.base.errors import CorruptPageError
from qaq_core.base.pages import PageShape
from services.common.secret import derive_key
from services.originals import page_groups
from services.originals.page_forms import FORMS, PageForm
from services.originals.page_groups import CHECKSUM_BYTES, GroupedPage
from services.originals.seals import SEAL_PART_BYTES, SHAPE_BYTES, Seal, Seals, read_shape, shape_bytes

_BEGIN = struct.Struct("<4sH")
_MAGIC, _VERSION = b"QAQP", 2
_SEAL_AT = _BEGIN.size + SHAPE_BYTES
_CHECKSUM_AT = _SEAL_AT + 2 * SEAL_PART_BYTES
HEADER_BYTES = _CHECKSUM_AT + CHECKSUM_BYTES

_WORD, _LONG = np.dtype("<u4"), np.dtype("<u8")
_LANES = 2
_HALF = np.uint64(32)

Data = bytes | bytearray | memoryview


class UnknownVersionError(CorruptPageError):
    """A page of this deployment in a version that another release writes: of no use here, and not to be removed."""


def stored_bytes(shape: PageShape) -> int:
    """Bytes of a stored page of version 2."""
    return HEADER_BYTES + shape.nbytes // shape.row_bytes * (shape.row_bytes + CHECKSUM_BYTES)


def head_bytes(shape: PageShape) -> int:
    """Bytes that `PageFormat.header` needs of any page of this shape."""
    return HEADER_BYTES + page_groups.index_bytes(shape)


@dataclass(frozen=True)
class Header:
    """The header of a page of version 2, verified or just made.

    Attributes:
        key: 32 bytes, for the checksums of this page.
    """

    shape: PageShape
    seal: Seal
    key: bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of the whole page."""
        return stored_bytes(self.shape)

    def span(self, place: int) -> tuple[int, int]:
        """First and last byte of a row and its checksum in the stored page.

        Args:
            place: of the row, counted from the first of the page.
        """
        size = self.shape.row_bytes + CHECKSUM_BYTES
        first = HEADER_BYTES + place * size
        return first, first + size - 1

    def rows(self, places: Sequence[int], stored: Sequence[bytes]) -> list[bytes | None]:
        """Rows as they were put, None where what is stored is not that row.

        Args:
            stored: for each place what lies at its `span`.
        """
        size = self.shape.row_bytes + CHECKSUM_BYTES
        whole = b"".join([one if len(one) == size else bytes(size) for one in stored])
        masks = b"".join([self._masks.digest(CHECKSUM_BYTES, seek=CHECKSUM_BYTES * place) for place in places])
        fits = self.fits(np.frombuffer(whole, np.uint8).reshape(-1, size), masks)
        return [one[:-CHECKSUM_BYTES] if right else None for one, right in zip(stored, fits.tolist(), strict=True)]

    def data(self, stored: Data) -> memoryview:
        """The data of a whole page.

        Raises:
            CorruptPageError: a row is not as it was put.
        """
        rows = _rows(stored, self.shape)
        if not self.fits(rows).all():
            raise CorruptPageError("rows do not match their checksums")
        return np.ascontiguousarray(rows[:, :-CHECKSUM_BYTES]).reshape(-1).data

    def fits(self, rows: np.ndarray, masks: bytes | None = None) -> np.ndarray:
        """bool [n]: whether the checksums fit the rows in front of them, uint8 [n, row_bytes + 8]."""
        bare, behind = rows[:, :-CHECKSUM_BYTES], rows[:, -CHECKSUM_BYTES:]
        return np.asarray((self.checksums(bare, masks) == behind).all(1))

    def checksums(self, rows: np.ndarray, masks: bytes | None = None) -> np.ndarray:
        """uint8 [n, 8]: the checksums of rows, uint8 [n, row_bytes].

        Args:
            masks: of these rows; None if they are the first rows of the page.
        """
        masks = self._masks.digest(CHECKSUM_BYTES * len(rows)) if masks is None else masks
        words = np.ascontiguousarray(rows).view(_WORD).astype(_LONG)
        one, other = (np.einsum("rw,lw->lr", words, self._keys[:, 1:]) + self._keys[:, :1]) >> _HALF
        return ((one | other << _HALF) ^ np.frombuffer(masks, _LONG)).astype(_LONG).view(np.uint8).reshape(-1, 8)

    @cached_property
    def _keys(self) -> np.ndarray:
        """uint64 [lanes, 1 + words of a row]: what is added, and a factor for each word."""
        size = 1 + self.shape.row_bytes // _WORD.itemsize
        raw = blake3(b"keys", key=self.key).digest(_LANES * size * _LONG.itemsize)
        return np.frombuffer(raw, _LONG).reshape(_LANES, size)

    @cached_property
    def _masks(self) -> blake3:
        return blake3(b"masks", key=self.key)


class PageFormat:
    """Packs and reads stored pages.

    Args:
        secret: of the deployment.
        form: of the pages that are packed; those of every form are read.
    """

    def __init__(self, secret: str, form: PageForm = "plain") -> None:
        self._key, self._seals = derive_key(secret, "page checksums"), Seals(secret)
        self._form = form

    def pack(self, page_id: bytes, shape: PageShape, seal: Seal, data: Data) -> memoryview:
        """The stored form of a page, whose seal must be right. A form that rounds seals what it keeps of the page."""
        bare = np.frombuffer(data, np.uint8).reshape(-1, shape.row_bytes)
        if self._form == "plain":
            return self._pack_plain(page_id, shape, seal, bare)
        form = FORMS[self._form]
        fixed, packed = form.split(bare, shape)
        if not form.exact:
            kept = form.join(fixed, packed, shape)
            seal = self._seals.again(seal, page_id, shape, np.ascontiguousarray(kept).reshape(-1).data)
        facts, key = self._facts(page_id, page_groups.VERSION, shape, seal)
        return memoryview(page_groups.pack(shape, seal, form, fixed, packed, facts, key))

    def header(self, page_id: bytes, stored: Data) -> Header | GroupedPage:
        """The header of a stored page of which at least the first `head_bytes` are given.

        Raises:
            CorruptPageError: it is not one of this version that was written under this id and with this secret.
        """
        version, shape, seal, key = self._read(page_id, stored)
        if version == _VERSION:
            return Header(shape, seal, key)
        return page_groups.read_index(shape, seal, key, HEADER_BYTES, stored)

    def shape(self, page_id: bytes, stored: Data) -> PageShape:
        """The shape of a stored page of which at least the first `HEADER_BYTES` are given.

        Raises:
            CorruptPageError: as `header`.
        """
        return self._read(page_id, stored)[1]

    def unpack(self, page_id: bytes, stored: Data) -> tuple[Header | GroupedPage, memoryview]:
        """Header and data of a stored page.

        Raises:
            CorruptPageError: header, length or a checksum is wrong.
        """
        header = self.header(page_id, stored)
        if len(stored) != header.stored_bytes:
            raise CorruptPageError(f"{len(stored):,} bytes are stored of {header.stored_bytes:,}")
        return header, header.data(stored)

    def _pack_plain(self, page_id: bytes, shape: PageShape, seal: Seal, bare: np.ndarray) -> memoryview:
        facts, key = self._facts(page_id, _VERSION, shape, seal)
        stored = bytearray(stored_bytes(shape))
        stored[:HEADER_BYTES] = facts
        rows = _rows(stored, shape)
        rows[:, :-CHECKSUM_BYTES] = bare
        rows[:, -CHECKSUM_BYTES:] = Header(shape, seal, key).checksums(bare)
        return memoryview(stored)

    def _read(self, page_id: bytes, stored: Data) -> tuple[int, PageShape, Seal, bytes]:
        """Version, shape, seal and key."""
        facts, checksum = bytes(stored[:_CHECKSUM_AT]), bytes(stored[_CHECKSUM_AT:HEADER_BYTES])
        if len(checksum) < CHECKSUM_BYTES:
            raise CorruptPageError("the header is cut off")
        magic, version = _BEGIN.unpack_from(facts)
        if magic != _MAGIC:
            raise CorruptPageError("it is not a page")
        key, shape = self._page_key(page_id, facts), read_shape(facts[_BEGIN.size : _SEAL_AT])
        if not hmac.compare_digest(_checksum(key), checksum):
            raise CorruptPageError("the header does not match its checksum")
        if version not in (_VERSION, page_groups.VERSION):
            raise UnknownVersionError(f"it is a page of version {version}, which is not known here")
        if shape is None:
            raise CorruptPageError("the header has no shape of a page")
        return version, shape, Seal(facts[_SEAL_AT:-SEAL_PART_BYTES], facts[-SEAL_PART_BYTES:]), key

    def _facts(self, page_id: bytes, version: int, shape: PageShape, seal: Seal) -> tuple[bytes, bytes]:
        """The header, and the key of the page."""
        facts = b"".join((_BEGIN.pack(_MAGIC, version), shape_bytes(shape), *seal))
        key = self._page_key(page_id, facts)
        return facts + _checksum(key), key

    def _page_key(self, page_id: bytes, facts: bytes) -> bytes:
        return blake3(page_id + facts, key=self._key).digest()


def _checksum(key: bytes) -> bytes:
    """Of the header, on which the key depends."""
    return blake3(b"header", key=key).digest(CHECKSUM_BYTES)


def _rows(stored: Data, shape: PageShape) -> np.ndarray:
    """uint8 [rows, bytes of a row and its checksum], without a copy."""
    return np.frombuffer(stored, np.uint8, offset=HEADER_BYTES).reshape(-1, shape.row_bytes + CHECKSUM_BYTES)
