"""Version 2 of a stored page: what comes back is what was packed, or an error, whatever happened to the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaq_core.base.errors import CorruptPageError
from qaq_core.base.pages import PageShape
from services.originals import page_format
from services.originals.page_format import CHECKSUM_BYTES, HEADER_BYTES, PageFormat, UnknownVersionError
from services.originals.seals import DTYPES, SEAL_PART_BYTES, Seal

# More of them: QAQ_FUZZ=100000 pytest tests/services/originals/test_page_format.py
TRIES = int(os.environ.get("QAQ_FUZZ", "600"))
FORMAT = PageFormat("a secret of this test", "plain")
SEAL = Seal(b"model".ljust(SEAL_PART_BYTES), b"mac".ljust(SEAL_PART_BYTES))
ID = bytes(range(32))
SMALL = PageShape(layers=2, kv_heads=1, tokens=8, head_dim=48)

shapes = st.builds(
    PageShape,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    tokens=st.integers(1, 40),
    head_dim=st.sampled_from([16, 48, 64, 272]),
    dtype=st.sampled_from(DTYPES),
)


def values(shape: PageShape, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(shape.nbytes)


def opened(stored: bytes | memoryview, page_id: bytes = ID, reader: PageFormat = FORMAT) -> list[bytes | None]:
    """The rows of a stored page as they are read by themselves: none, or None where there is none to be used."""
    try:
        header = reader.header(page_id, stored)
    except CorruptPageError:
        return []
    places = range(header.shape.nbytes // header.shape.row_bytes)
    spans = (header.span(place) for place in places)
    return header.rows(places, [bytes(stored[first : last + 1]) for first, last in spans])


@given(shapes, st.integers(0, 2**32), st.binary(min_size=32, max_size=32))
@settings(max_examples=60, deadline=None)
def test_what_was_packed_comes_back(shape: PageShape, seed: int, page_id: bytes) -> None:
    data = values(shape, seed)
    stored = FORMAT.pack(page_id, shape, SEAL, data)
    header, back = FORMAT.unpack(page_id, stored)
    assert (header.shape, header.seal) == (shape, SEAL)
    assert bytes(back) == data
    assert b"".join(row or b"" for row in opened(stored, page_id)) == data


@given(shapes, st.integers(0, 2**32), st.data())
@settings(max_examples=60, deadline=None)
def test_some_rows_are_some_of_all(shape: PageShape, seed: int, data: st.DataObject) -> None:
    """In any order, some of them twice, and also when nothing is stored at their place any more."""
    stored, whole = FORMAT.pack(ID, shape, SEAL, values(shape, seed)), values(shape, seed)
    header, size = FORMAT.header(ID, stored), shape.row_bytes
    places = data.draw(st.lists(st.integers(0, len(whole) // size - 1), max_size=20))
    gone = data.draw(st.lists(st.booleans(), min_size=len(places), max_size=len(places)))
    spans = [header.span(place) for place in places]
    read = [b"" if lost else bytes(stored[first : last + 1]) for lost, (first, last) in zip(gone, spans, strict=True)]
    right = [None if lost else whole[at * size : at * size + size] for lost, at in zip(gone, places, strict=True)]
    assert header.rows(places, read) == right


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_other_bytes_are_never_read(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    packed = FORMAT.pack(ID, shape, SEAL, values(shape))
    stored = bytearray(packed)
    first = data.draw(st.integers(0, len(stored)))
    stored[first : first + data.draw(st.integers(0, 300))] = data.draw(st.binary(max_size=300))
    if stored == packed:
        return
    with pytest.raises(CorruptPageError):
        FORMAT.unpack(ID, stored)


def test_every_byte_is_covered() -> None:
    """The header and two rows with their checksums, byte by byte."""
    packed = FORMAT.pack(ID, SMALL, SEAL, values(SMALL))
    for place in range(HEADER_BYTES + 2 * (SMALL.row_bytes + CHECKSUM_BYTES)):
        stored = bytearray(packed)
        stored[place] ^= 1 << place % 8
        with pytest.raises(CorruptPageError):
            FORMAT.unpack(ID, stored)
        rows = opened(bytes(stored))
        assert rows == [] if place < HEADER_BYTES else rows.count(None) == 1


def test_every_length_is_covered() -> None:
    stored = bytes(FORMAT.pack(ID, SMALL, SEAL, values(SMALL)))
    for size in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(stored) - CHECKSUM_BYTES, len(stored) - 1):
        with pytest.raises(CorruptPageError):
            FORMAT.unpack(ID, stored[:size])
    with pytest.raises(CorruptPageError, match="bytes are stored of"):
        FORMAT.unpack(ID, stored + b"\0")


def test_a_page_fits_one_id_one_secret_and_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = FORMAT.pack(ID, SMALL, SEAL, values(SMALL))
    with pytest.raises(CorruptPageError, match="does not match its checksum"):
        FORMAT.unpack(bytes(32), stored)
    for secret in ("", "another secret of this test"):
        with pytest.raises(CorruptPageError, match="does not match its checksum"):
            PageFormat(secret).unpack(ID, stored)
    monkeypatch.setattr(page_format, "_VERSION", 4)
    with pytest.raises(UnknownVersionError, match="a page of version 2, which is not known"):
        FORMAT.unpack(ID, stored)


def test_a_row_fits_one_place_and_one_page() -> None:
    data = bytes(SMALL.nbytes)  # all rows are equal
    stored = FORMAT.pack(ID, SMALL, SEAL, data)
    header = FORMAT.header(ID, stored)
    resealed = FORMAT.header(ID, FORMAT.pack(ID, SMALL, SEAL._replace(mac=bytes(SEAL_PART_BYTES)), data))
    first, last = header.span(0)
    row = bytes(stored[first : last + 1])
    assert header.rows([0, 1, 0], [row, row, row]) == [data[: SMALL.row_bytes], None, data[: SMALL.row_bytes]]
    assert resealed.rows([0], [row]) == [None]


def test_a_checksum_has_64_bits() -> None:
    """Rows that differ in one bit have checksums of which about half of the bits differ, and none is always equal."""
    random = np.random.default_rng(0)
    header = FORMAT.header(ID, FORMAT.pack(ID, SMALL, SEAL, bytes(SMALL.nbytes)))
    bits = 8 * SMALL.row_bytes
    rows = np.repeat(np.frombuffer(random.bytes(SMALL.row_bytes), np.uint8)[None], bits, 0)
    rows[np.arange(bits), np.arange(bits) // 8] ^= (1 << np.arange(bits) % 8).astype(np.uint8)
    found = np.unpackbits(header.checksums(rows, bytes(CHECKSUM_BYTES * bits)), axis=1)
    assert len(np.unique(found, axis=0)) == bits
    assert np.abs(found.mean(0) - 0.5).max() < 0.2


Random = np.random.Generator
Damage = Callable[[bytearray, bytes, Random], None]


def flip(stored: bytearray, other: bytes, random: Random) -> None:
    for _ in range(random.integers(1, 4)):
        stored[random.integers(len(stored))] ^= 1 << int(random.integers(8))


def garbage(stored: bytearray, other: bytes, random: Random) -> None:
    first, size = int(random.integers(len(stored))), int(random.integers(1, 2000))
    stored[first : first + size] = random.bytes(min(size, len(stored) - first))


def zeros(stored: bytearray, other: bytes, random: Random) -> None:
    first, size = int(random.integers(len(stored))), int(random.integers(1, 2000))
    stored[first : first + size] = bytes(min(size, len(stored) - first))


def cut(stored: bytearray, other: bytes, random: Random) -> None:
    del stored[int(random.integers(len(stored))) :]


def extend(stored: bytearray, other: bytes, random: Random) -> None:
    stored += random.bytes(int(random.integers(1, 500)))


def move(stored: bytearray, other: bytes, random: Random) -> None:
    """A row, with its checksum or without, or another piece, to another place."""
    step = SMALL.row_bytes + CHECKSUM_BYTES
    size = int(random.choice([step, SMALL.row_bytes, CHECKSUM_BYTES, HEADER_BYTES]))
    source, target = (int(random.integers(len(stored) - size)) for _ in range(2))
    if random.integers(2):
        source, target = (HEADER_BYTES + at // step * step for at in (source, target))
    stored[target : target + size] = stored[source : source + size]


def mix(stored: bytearray, other: bytes, random: Random) -> None:
    """Bytes of another page at the same place, up to all of them."""
    first = int(random.choice([0, HEADER_BYTES, random.integers(len(stored))]))
    last = int(random.integers(first, len(other) + 1))
    stored[first:last] = other[first:last]


def other_header(stored: bytearray, other: bytes, random: Random) -> None:
    """Numbers of the header that lie in range, and wild ones."""
    place = int(random.integers(HEADER_BYTES // 2)) * 2
    stored[place : place + 2] = int(random.choice([0, 1, 2, 3, 255, 32767, 65535])).to_bytes(2, "little")


def anything(stored: bytearray, other: bytes, random: Random) -> None:
    stored[:] = random.bytes(int(random.integers(4000)))


DAMAGES: tuple[Damage, ...] = (flip, garbage, zeros, cut, extend, move, mix, other_header, anything)


@pytest.mark.parametrize("secret", ["a secret of this test", ""])
def test_damaged_pages_give_the_right_rows_or_none(secret: str) -> None:
    random, form = np.random.default_rng(TRIES), PageFormat(secret, "plain")
    data = [values(SMALL, seed) for seed in range(2)]
    packed, other = (
        bytes(form.pack(page_id, SMALL, SEAL, raw)) for page_id, raw in zip((ID, ID[::-1]), data, strict=True)
    )
    whole = opened(packed, reader=form)
    refused = 0
    for index in range(TRIES):
        stored = bytearray(packed)
        DAMAGES[index % len(DAMAGES)](stored, other, random)
        try:
            back = bytes(form.unpack(ID, stored)[1])
        except CorruptPageError:
            refused += 1
        else:
            assert back == data[0]
            assert stored == packed
        rows = opened(bytes(stored), reader=form)
        assert all(row in (None, right) for row, right in zip(rows, whole, strict=False))
        assert len(rows) in (0, len(whole))
    assert refused > 0.8 * TRIES
