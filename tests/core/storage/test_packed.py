"""Packed tokens: what they hold is what the quantizer makes of the originals, whatever they went through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.quantization.outliers import split_outliers
from qaq_core.storage import packed as packed_module
from qaq_core.storage.packed import PackedTokens
from tests.core.rows import HEAD_DIMS, QUANTIZER_NAMES, normal, page_shape, quantizers, request

LAYERS, HEADS, START = 2, 2, 4
CPU = torch.device("cpu")
EVERY = torch.tensor(WIDTHS[:-1], dtype=torch.uint8)


class Subject:
    """Packed tokens beside the originals and the widths they should have."""

    def __init__(self, name: str, dim: int, seed: int) -> None:
        self.quantizer = quantizers(LAYERS, HEADS, dim)[name]
        self.packed = PackedTokens(self.quantizer, (LAYERS, HEADS, dim), START, CPU)
        self.generator = torch.Generator().manual_seed(seed)
        self.originals = torch.empty(2, LAYERS, HEADS, 0, dim)
        self.widths = torch.empty(2, LAYERS, HEADS, 0, dtype=torch.uint8)
        self.shape = page_shape(LAYERS, HEADS, dim)

    def random_widths(self, *shape: int) -> torch.Tensor:
        return EVERY[torch.randint(0, len(EVERY), shape, generator=self.generator)]

    def append(self, n: int) -> None:
        fresh = torch.randn(2, LAYERS, HEADS, n, self.originals.shape[-1], generator=self.generator) * 3
        widths = self.random_widths(2, LAYERS, HEADS, n)
        rows = [self.quantizer.rows(side, fresh[side], self.packed.stop) for side in (KEY, VALUE)]
        metas = [self.quantizer.codec.meta(row, None) for row in rows]
        self.packed.append((widths[0], widths[1]), (rows[0], rows[1]), (metas[0], metas[1]), (None, None))
        self.originals = torch.cat([self.originals, fresh], 3)
        self.widths = torch.cat([self.widths, widths], 3)

    def ask(self, side: int, index: torch.Tensor, have: torch.Tensor, want: torch.Tensor) -> np.ndarray:
        """Planes from the originals, as the cache service answers."""
        layer, head, token = np.unravel_index(index.numpy(), self.packed.tags.shape)
        asked = request(
            self.shape,
            self.packed.sides[side].meta,
            layer,
            head,
            token + START,
            np.full(len(index), side),
            have.numpy(),
            want.numpy(),
            START,
        )
        rows = self.originals[side].reshape(-1, self.originals.shape[-1])[index]
        return self.quantizer.requantize(asked, rows)

    def change(self, side: int, count: int) -> None:
        flat = self.widths[side].reshape(-1)
        index = torch.randperm(len(flat), generator=self.generator)[:count].sort().values
        old, new = flat[index], self.random_widths(len(index))
        moving = old != new
        index, old, new = index[moving], old[moving], new[moving]
        up = new > old
        planes = self.ask(side, index[up], old[up], new[up])
        sizes = torch.where(up, (new.long() - old.long()) * self.originals.shape[-1] // 16, 0)
        self.packed.change(side, index, new, torch.from_numpy(planes), sizes.cumsum(0) - sizes)
        flat[index] = new

    def narrow(self) -> None:
        most = self.random_widths(*self.widths.shape)
        assert self.packed.narrow((most[KEY], most[VALUE])) == int((most < self.widths).sum())
        self.widths = torch.minimum(self.widths, most)

    def crop(self, tokens: int) -> None:
        self.packed.crop(tokens)
        self.originals, self.widths = self.originals[:, :, :, :tokens], self.widths[..., :tokens].clone()

    def agrees(self) -> None:
        """Every row is bit for bit what the quantizer makes of its original at the width it should have."""
        packed = self.packed
        for side in (KEY, VALUE):
            assert torch.equal(packed.widths(side), self.widths[side])
            for block, pool in enumerate(packed.sides[side].pools):
                first, last = packed.block_range(block)
                held = self.widths[side][:, :, first:last]
                for width in held.unique().tolist():
                    if width == 0:
                        continue
                    here = torch.zeros_like(self.widths[side], dtype=torch.bool)
                    here[:, :, first:last] = held == width
                    index = torch.nonzero(here.reshape(-1)).squeeze(1)
                    zero = torch.zeros(len(index), dtype=torch.uint8)
                    expected = self.ask(side, index, zero, zero + width)
                    assert np.array_equal(pool.rows[width].reshape(-1).numpy(), expected)

    def counts(self) -> int:
        """Bytes by the sum of what must be there."""
        half_bit = self.originals.shape[-1] // 16
        metas = sum(side.meta.numel() for side in self.packed.sides)
        pools = sum(4 * pool.first.numel() for side in self.packed.sides for pool in side.pools)
        return int(self.widths.long().sum()) * half_bit + self.packed.tags.numel() + metas + pools


@given(data=st.data(), dim=st.sampled_from(HEAD_DIMS), seed=st.integers(0, 1 << 30))
@pytest.mark.parametrize("name", QUANTIZER_NAMES)
def test_rows_are_the_originals_quantized_through_appends_and_moves(
    name: str, data: st.DataObject, dim: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "BLOCK_TOKENS", 8)  # several blocks with few tokens
        subject = Subject(name, dim, seed)
        subject.append(data.draw(st.integers(1, 20)))
        for _ in range(data.draw(st.integers(1, 4))):
            match data.draw(st.sampled_from(("append", "change", "narrow", "crop"))):
                case "append":
                    subject.append(data.draw(st.integers(1, 10)))
                case "change":
                    subject.change(data.draw(st.sampled_from((KEY, VALUE))), data.draw(st.integers(1, 30)))
                case "narrow":
                    subject.narrow()
                case "crop":
                    subject.crop(data.draw(st.integers(0, len(subject.packed))))
        subject.agrees()
        assert subject.packed.nbytes == subject.counts()


def test_narrowing_is_quantizing_the_original() -> None:
    """No double quantization: 8 bits narrowed to 2.5 are the 2.5 bits of the original."""
    subject = Subject("balanced", 64, 0)
    subject.append(5)
    for target in (16, 5):
        index = torch.arange(LAYERS * HEADS * 5)
        old = subject.widths[KEY].reshape(-1)
        lower = torch.minimum(old, torch.full_like(old, target))
        new = torch.full_like(old, target) if target == 16 else lower
        up = new > old
        planes = subject.ask(KEY, index[up], old[up], new[up])
        sizes = torch.where(up, (new.long() - old.long()) * 4, 0)
        subject.packed.change(KEY, index, new, torch.from_numpy(planes), sizes.cumsum(0) - sizes)
        subject.widths[KEY] = new.view(LAYERS, HEADS, 5)
        subject.agrees()
    assert subject.packed.histogram(KEY) == {2.5: LAYERS * HEADS * 5}


def test_histogram_counts_vectors_per_width_and_side() -> None:
    subject = Subject("balanced", 32, 0)
    subject.append(40)
    for side in (KEY, VALUE):
        widths, counts = subject.widths[side].unique(return_counts=True)
        assert subject.packed.histogram(side) == dict(zip((widths / 2).tolist(), counts.tolist(), strict=True))


def test_half_precision_rows_hold_the_row() -> None:
    subject = Subject("balanced", 64, 0)
    original = normal(0, 2, LAYERS, HEADS, 3, 64)
    rows = [subject.quantizer.rows(side, original[side], START) for side in (KEY, VALUE)]
    metas = [subject.quantizer.codec.meta(row, None) for row in rows]
    widths = torch.full((LAYERS, HEADS, 3), HALF, dtype=torch.uint8)
    subject.packed.append((widths, widths), (rows[0], rows[1]), (metas[0], metas[1]), (None, None))
    held = subject.packed.sides[KEY].pools[0].rows[HALF]
    scale, _ = subject.quantizer.codec.affine(metas[KEY])
    units = held.view(torch.float16).view(LAYERS, HEADS, 3, 64).float()
    got = units * subject.quantizer.spread(scale, 64)
    assert torch.allclose(got, rows[KEY], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("width", WIDTHS[1:-1])
def test_half_precision_rows_become_the_codes_of_what_they_hold(width: int, at_once: bool) -> None:
    subject = Subject("balanced", 64, 0)
    original = normal(0, 2, LAYERS, HEADS, 3, 64)
    rows = [subject.quantizer.rows(side, original[side], START) for side in (KEY, VALUE)]
    metas = [subject.quantizer.codec.meta(row, None) for row in rows]
    halves = torch.full((LAYERS, HEADS, 3), HALF, dtype=torch.uint8)
    subject.packed.append((halves, halves), (rows[0], rows[1]), (metas[0], metas[1]), (None, None))
    units = subject.packed.sides[VALUE].pools[0].rows[HALF].view(torch.float16).float()
    index = torch.tensor([1, 4, 5, 11])
    nothing = torch.empty(0, dtype=torch.uint8)
    widths = torch.full((4,), width, dtype=torch.uint8)
    if at_once:
        most = halves.clone()
        most.view(-1)[index] = width
        assert subject.packed.narrow((halves, most)) == 4
    else:
        subject.packed.change(VALUE, index, widths, nothing, torch.zeros_like(index))
    layout = subject.quantizer.layout(VALUE, 64)
    expected = layout.pack(subject.quantizer.codec.codes(units), 0, layout.row_bytes(width))
    assert torch.equal(subject.packed.sides[VALUE].pools[0].rows[width], expected[index])
    assert subject.packed.histogram(VALUE) == {width / 2: 4, 16: LAYERS * HEADS * 3 - 4}


def test_outliers_are_counted_and_grow_with_the_tokens() -> None:
    subject = Subject("uniform-layer", 64, 0)
    original = normal(0, 2, LAYERS, HEADS, 6, 64)
    rows = [subject.quantizer.rows(side, original[side], START) for side in (KEY, VALUE)]
    split = [split_outliers(row, 0.1, "layer") for row in rows]
    metas = [subject.quantizer.codec.meta(row, mask) for row, (_, mask) in zip(rows, split, strict=True)]
    for part in (slice(0, 4), slice(4, 6)):
        n = len(range(6)[part])
        widths = torch.full((LAYERS, HEADS, n), 2, dtype=torch.uint8)
        kept = [outliers.narrow(part.start, part.stop) for outliers, _ in split]
        subject.packed.append(
            (widths, widths),
            (rows[0][:, :, part], rows[1][:, :, part]),
            (metas[0][:, :, part], metas[1][:, :, part]),
            (kept[0], kept[1]),
        )
    codes = 2 * LAYERS * HEADS * 6 * 64 // 16 * 2
    codes += 2 * 4 * LAYERS * HEADS * len(WIDTHS)  # where each head's rows begin
    expected = codes + LAYERS * HEADS * 6 + sum(meta.numel() for meta in metas) + sum(o.nbytes for o, _ in split)
    assert subject.packed.nbytes == expected
    held = subject.packed.sides[KEY].outliers
    assert held is not None
    assert torch.equal(held.value, split[KEY][0].value)


def test_the_address_of_a_row_stays_when_tokens_are_appended() -> None:
    subject = Subject("uniform-head", 32, 0)
    subject.append(7)
    index = torch.tensor([0, 6, 7, 13, 27])
    address = subject.packed.address(index)
    layer, head, token = np.unravel_index(index.numpy(), (LAYERS, HEADS, 7))
    assert [part.tolist() for part in address] == [layer.tolist(), head.tolist(), (token + START).tolist()]
    assert torch.equal(subject.packed.flat_index(*address), index)
    meta = subject.packed.meta_at(VALUE, *address)
    full = subject.packed.sides[VALUE].meta.expand(LAYERS, HEADS, 7, -1)
    assert torch.equal(meta, full.reshape(LAYERS * HEADS * 7, -1)[index])
    subject.append(5)
    narrow = [part.to(dtype) for part, dtype in zip(address, (torch.int16, torch.int16, torch.int32), strict=True)]
    moved = np.ravel_multi_index((layer, head, token), (LAYERS, HEADS, 12))
    assert subject.packed.flat_index(*narrow).tolist() == moved.tolist()


def test_outliers_of_cropped_tokens_go() -> None:
    subject = Subject("uniform-layer", 64, 0)
    original = normal(0, 2, LAYERS, HEADS, 6, 64)
    rows = [subject.quantizer.rows(side, original[side], START) for side in (KEY, VALUE)]
    split = [split_outliers(row, 0.1, "layer") for row in rows]
    metas = [subject.quantizer.codec.meta(row, mask) for row, (_, mask) in zip(rows, split, strict=True)]
    widths = torch.full((LAYERS, HEADS, 6), 2, dtype=torch.uint8)
    subject.packed.append((widths, widths), (rows[0], rows[1]), (metas[0], metas[1]), (split[0][0], split[1][0]))
    subject.packed.crop(2)
    held = subject.packed.sides[VALUE].outliers
    assert held is not None
    assert torch.equal(held.value, split[VALUE][0].value[:, :, :2])
    assert held.nbytes == split[VALUE][0].nbytes // 3
