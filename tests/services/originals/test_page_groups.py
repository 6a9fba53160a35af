"""Version 3 of a stored page: what comes back of any row is what a plain page gives, or nothing."""

from __future__ import annotations

import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qaq_core.base.errors import CorruptPageError
from qaq_core.base.pages import PageShape
from qaq_core.storage import HeldValues, rounded
from services.originals import page_groups
from services.originals.page_format import HEADER_BYTES, PageFormat, head_bytes
from services.originals.page_forms import FORMS, PageForm
from services.originals.seals import Seal, Seals
from tests.services.originals.test_page_format import DAMAGES, ID, SEAL, SMALL, opened, shapes, values

SECRET = "a secret of this test"
PLAIN, LOSSLESS = PageFormat(SECRET, "plain"), PageFormat(SECRET, "lossless")
RECORDED = Path(__file__).with_name("page_version_2.bin")


def numbers(shape: PageShape, seed: int = 0) -> torch.Tensor:
    """Values like those of keys: every dimension with a scale and a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(shape.head_dim, generator=generator).exp()
    data = torch.randn(shape.dims, generator=generator) * scale + torch.randn(shape.head_dim, generator=generator)
    return data.to(shape.torch_dtype)


def raw(data: torch.Tensor) -> bytes:
    return data.contiguous().view(torch.uint8).numpy().tobytes()


@given(shapes, st.integers(0, 2**32), st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_rows_are_those_of_a_plain_page(shape: PageShape, seed: int, noise: bool, data: st.DataObject) -> None:
    """Bit for bit, NaN and infinities among them: all of them, and some in any order, also twice or gone."""
    whole = values(shape, seed) if noise else raw(numbers(shape, seed))
    pages = [form.pack(ID, shape, SEAL, whole) for form in (PLAIN, LOSSLESS)]
    assert opened(pages[1], reader=PLAIN) == opened(pages[0], reader=LOSSLESS)
    header, back = PLAIN.unpack(ID, pages[1])
    assert (header.shape, header.seal, bytes(back)) == (shape, SEAL, whole)
    size = shape.row_bytes
    places = data.draw(st.lists(st.integers(0, len(whole) // size - 1), max_size=20))
    gone = data.draw(st.lists(st.booleans(), min_size=len(places), max_size=len(places)))
    spans = [header.span(place) for place in places]
    read = [b"" if lost else bytes(pages[1][at : to + 1]) for lost, (at, to) in zip(gone, spans, strict=True)]
    right = [None if lost else whole[at * size : at * size + size] for lost, at in zip(gone, places, strict=True)]
    assert header.rows(places, read) == right


def test_a_page_of_the_former_version_is_read() -> None:
    """One that was written by the code of that version."""
    whole, stored = values(SMALL), RECORDED.read_bytes()
    for reader in (PLAIN, LOSSLESS):
        assert bytes(reader.unpack(ID, stored)[1]) == whole
        assert b"".join(row or b"" for row in opened(stored, reader=reader)) == whole
    assert bytes(PLAIN.pack(ID, SMALL, SEAL, whole)) == stored


@pytest.mark.parametrize("version", [0, 1, 3, 4, 255])
def test_a_page_that_names_another_version_gives_nothing(version: int) -> None:
    for stored in (RECORDED.read_bytes(), LOSSLESS.pack(ID, SMALL, SEAL, values(SMALL))):
        other = bytearray(stored)
        if other[4] == version:
            continue
        other[4] = version
        assert opened(bytes(other), reader=LOSSLESS) == []
        with pytest.raises(CorruptPageError):
            LOSSLESS.unpack(ID, other)


@pytest.mark.parametrize("form", FORMS)
def test_every_byte_is_covered(form: PageForm) -> None:
    writer = PageFormat(SECRET, form)
    packed = writer.pack(ID, SMALL, SEAL, raw(numbers(SMALL)))
    whole = opened(packed, reader=writer)
    head = head_bytes(SMALL)
    for place in [*range(0, head, 3), *range(head, len(packed), 149), len(packed) - 1]:
        stored = bytearray(packed)
        stored[place] ^= 1 << place % 8
        with pytest.raises(CorruptPageError):
            LOSSLESS.unpack(ID, stored)
        rows = opened(bytes(stored), reader=LOSSLESS)
        if place < head:
            assert rows == []
        else:
            lost = [number for number, row in enumerate(rows) if row is None]
            assert lost == list(range(lost[0], lost[0] + 16))
            assert all(row in (None, right) for row, right in zip(rows, whole, strict=True))


def test_damaged_pages_give_the_right_rows_or_none() -> None:
    random = np.random.default_rng(5)
    data = [raw(numbers(SMALL, seed)) for seed in range(2)]
    packed, other = (
        bytes(LOSSLESS.pack(*facts)) for facts in ((ID, SMALL, SEAL, data[0]), (ID[::-1], SMALL, SEAL, data[1]))
    )
    whole, refused = opened(packed, reader=LOSSLESS), 0
    for index in range(400):
        stored = bytearray(packed)
        DAMAGES[index % len(DAMAGES)](stored, other, random)
        try:
            back = bytes(LOSSLESS.unpack(ID, stored)[1])
        except CorruptPageError:
            refused += 1
        else:
            assert stored == packed
            assert back == data[0]
        rows = opened(bytes(stored), reader=LOSSLESS)
        assert all(row in (None, right) for row, right in zip(rows, whole, strict=False))
    assert refused > 300


def test_a_group_fits_one_place_one_page_and_one_secret() -> None:
    stored = LOSSLESS.pack(ID, SMALL, SEAL, bytes(SMALL.nbytes))  # all groups are equal
    header = LOSSLESS.header(ID, stored)
    first, last = header.span(0)
    group = bytes(stored[first : last + 1])
    assert header.rows([0, 15, 16], [group] * 3) == [bytes(SMALL.row_bytes)] * 2 + [None]
    other = LOSSLESS.header(ID[::-1], LOSSLESS.pack(ID[::-1], SMALL, SEAL, bytes(SMALL.nbytes)))
    assert other.rows([0], [group]) == [None]
    with pytest.raises(CorruptPageError):
        PageFormat("another secret of this test").unpack(ID, stored)


def test_nothing_unverified_is_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = LOSSLESS.pack(ID, SMALL, SEAL, values(SMALL))
    header = LOSSLESS.header(ID, packed)
    first, last = header.span(0)
    group = bytearray(packed[first : last + 1])
    group[3] ^= 1

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was decompressed")

    monkeypatch.setattr(page_groups.zlib, "decompressobj", refuse)
    assert header.rows([0], [bytes(group)]) == [None]


def test_what_decompresses_to_more_takes_no_memory() -> None:
    """Even if somebody with the secret had sealed it."""
    codec = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = codec.compress(bytes(64 << 20)) + codec.flush()
    tracemalloc.start()
    assert page_groups._unpacked(bomb, 1024) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert page_groups._unpacked(bomb[:50], 64 << 20) is None
    assert page_groups._unpacked(b"\xff" * 40, 1024) is None
    assert page_groups._unpacked(page_groups._packed(bytes(1024)), 1024) == bytes(1024)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["float16", "int8"])
def test_rounded_pages_are_those_that_the_library_rounds(form: HeldValues, dtype: str) -> None:
    """So what `qaq eval` measures is what a cache service stores. What comes back has a seal of its own."""
    shape, seals = PageShape(layers=2, kv_heads=2, tokens=9, head_dim=48, dtype=dtype), Seals(SECRET, "model")
    data = numbers(shape)
    seal = seals.make(ID, shape, raw(data))
    header, back = LOSSLESS.unpack(ID, PageFormat(SECRET, form).pack(ID, shape, seal, raw(data)))
    assert bytes(back) == raw(rounded(data, form))
    assert seals.is_own(header.seal)
    assert seals.fits(header.seal, ID, shape, back)
    assert form == "int8" or (dtype != "float32") == (header.seal == seal)
    near = torch.frombuffer(bytearray(back), dtype=shape.torch_dtype).view(shape.dims).float()
    error = (near - data.float()).square().sum() / data.float().square().sum()
    assert error < (1e-6 if form == "float16" else 2e-4)


def test_values_that_half_precision_does_not_have_stay_finite() -> None:
    shape = PageShape(layers=1, kv_heads=1, tokens=16, head_dim=16)
    data = torch.full(shape.dims, 1e6)
    _, back = LOSSLESS.unpack(ID, PageFormat(SECRET, "float16").pack(ID, shape, SEAL, raw(data)))
    assert torch.frombuffer(bytearray(back), dtype=torch.float32).unique().tolist() == [65504.0]


def test_pages_become_smaller() -> None:
    """Also where groups are not whole, and nearly so where values are noise."""
    shape = PageShape(layers=4, kv_heads=3, tokens=31, head_dim=64, dtype="bfloat16")
    whole = raw(numbers(shape))
    plain, lossless, eight = (
        len(PageFormat(SECRET, form).pack(ID, shape, SEAL, whole)) for form in ("plain", "lossless", "int8")
    )
    assert lossless < 0.7 * plain
    assert eight < 0.52 * plain
    assert len(LOSSLESS.pack(ID, shape, SEAL, values(shape))) < 1.02 * plain


def test_wide_rows_come_in_smaller_groups() -> None:
    shape = PageShape(layers=1, kv_heads=1, tokens=3, head_dim=32752, dtype="bfloat16")
    assert page_groups.group_rows(shape) == 1
    whole = values(shape)
    assert bytes(LOSSLESS.unpack(ID, LOSSLESS.pack(ID, shape, SEAL, whole))[1]) == whole


def test_a_seal_says_what_was_kept() -> None:
    assert Seal(*Seals(SECRET, "a model").again(SEAL, ID, SMALL, b"")).model == SEAL.model
    assert HEADER_BYTES == 64
