"""Rows in tiles hold what rows by width hold, whatever is done to them, and no more memory than they say."""

from __future__ import annotations

import shutil

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.kernels.cuda.emulation import Emulation
from qaq_core.kernels.cuda.weave import CudaWeaver
from qaq_core.storage import packed as packed_module
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.tiled_pool import TiledPool
from tests.core.conformance import CPU, quantizer
from tests.core.rows import normal

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile kernels for a CPU")

LAYERS, HEADS, DIM, POOL = 2, 3, 64, 256


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", POOL)


class Pair:
    """The same tokens by width and in tiles."""

    def __init__(self) -> None:
        self.quantizer = quantizer("progressive", LAYERS, HEADS, DIM)
        shape = (LAYERS, HEADS, DIM)
        self.by_width = PackedTokens(self.quantizer, shape, 4, CPU)
        self.tiled = PackedTokens(self.quantizer, shape, 4, CPU, CudaWeaver(Emulation()))
        self.both = self.by_width, self.tiled
        self._generator = torch.Generator().manual_seed(1)

    def widths(self, *shape: int, of: tuple[int, ...] = WIDTHS) -> torch.Tensor:
        return torch.tensor(of, dtype=torch.uint8)[torch.randint(len(of), shape, generator=self._generator)]

    def append(self, tokens: int) -> None:
        rows = normal(tokens, 2, LAYERS, HEADS, tokens, DIM)
        widths = self.widths(2, LAYERS, HEADS, tokens)
        metas = [self.quantizer.meta(one) for one in rows]
        for packed in self.both:
            packed.append((widths[0], widths[1]), (rows[0], rows[1]), (metas[0], metas[1]), (None, None))

    def change(self, side: int, every: int) -> None:
        """Changes rows, with random bytes for what they lack."""
        index = torch.arange(1, self.tiled.tags.numel(), every)
        widths = self.widths(len(index))
        size = DIM // 16 * HALF
        planes = torch.randint(256, (len(index) * size,), dtype=torch.uint8, generator=self._generator)
        for packed in self.both:
            packed.change(side, index, widths, planes, torch.arange(len(index)) * size)

    def check(self) -> None:
        """All rows, some rows, and bytes."""
        for side in (KEY, VALUE):
            for number, (pool, tiles) in enumerate(zip(*(one.sides[side].pools for one in self.both), strict=True)):
                assert isinstance(tiles, TiledPool)
                first, last = self.tiled.block_range(number)
                for layer in range(LAYERS):
                    tags = self.tiled.tags[layer, :, first:last]
                    expected, got = (one.of_layer(tags, side, layer) for one in (pool, tiles))
                    expected = {width: rows for width, rows in expected.items() if len(rows)}
                    assert expected.keys() == got.keys()
                    assert all(torch.equal(rows, got[width]) for width, rows in expected.items())
                    head, token = torch.arange(7) % HEADS, torch.arange(7) * 5 % (last - first)
                    taken = (one.take_at(tags, side, layer, head, token) for one in (pool, tiles))
                    for (width, where, rows), (its_width, its, others) in zip(*taken, strict=True):
                        assert width == its_width
                        assert torch.equal(where, its)
                        assert torch.equal(rows, others)
                assert [tiles.holds(width) for width in WIDTHS[1:]] == [width in pool.rows for width in WIDTHS[1:]]
                assert tiles._tiles is not None
                codes = int(self.tiled.widths(side)[:, :, first:last].long().sum()) * DIM // 16
                blocks = -(-(last - first) // 128)
                places = 8 * 16 * LAYERS * HEADS * blocks
                most = 3 * sum(WIDTHS) * DIM // 16 * LAYERS * HEADS * blocks
                assert places + codes <= tiles.nbytes <= places + codes + most


def test_rows_in_tiles_are_those_by_width() -> None:
    pair = Pair()
    for tokens in (3, 130, 8, 250):
        pair.append(tokens)
        pair.check()
    for side, every in ((KEY, 3), (VALUE, 7), (KEY, 1)):
        pair.change(side, every)
        pair.check()
    most = [pair.widths(LAYERS, HEADS, len(pair.tiled), of=(1, 4, 8, 16)) for _ in range(2)]
    assert len({packed.narrow((most[0], most[1])) for packed in pair.both}) == 1
    pair.check()
    for packed in pair.both:
        packed.crop(200)
    pair.check()
    pair.append(90)
    pair.check()


def test_a_copy_shares_no_memory() -> None:
    pair = Pair()
    pair.append(140)
    tags = pair.tiled.tags[0]
    copied = pair.tiled.copy()
    before = copied.sides[KEY].pools[0].of_layer(tags, KEY, 0)
    pair.change(KEY, 2)
    after = copied.sides[KEY].pools[0].of_layer(tags, KEY, 0)
    assert all(torch.equal(rows, after[width]) for width, rows in before.items())
    assert not set(copied.runs.view(-1).tolist()) & set(pair.tiled.runs.view(-1).tolist())


def test_addresses_stay_until_rows_change_and_are_counted() -> None:
    pair = Pair()
    pair.append(140)
    without = pair.tiled.nbytes
    runs = pair.tiled.runs
    assert runs.shape == (LAYERS, HEADS, 2, 2, 16)
    assert pair.tiled.runs.data_ptr() == runs.data_ptr()
    assert pair.tiled.nbytes == without + runs.nbytes
    pair.append(8)
    assert not torch.equal(pair.tiled.runs, runs)


def test_pools_that_blocks_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 100)
    with pytest.raises(ConfigError, match="pools of 100 tokens cannot be tiled in blocks of 128"):
        Pair().append(3)
