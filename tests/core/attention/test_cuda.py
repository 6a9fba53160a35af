"""CUDA kernels, emulated on a CPU, against float64 over the same decoded numbers.

What they compute is shown by this. That they run on a GPU, and how fast, is not: see docs/gpu.md.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from qaq_core.allocation.attention_statistics import StepObserver
from qaq_core.attention.cuda import CudaAttention
from qaq_core.base.pages import VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.kernels.cuda import emulation, structures
from qaq_core.kernels.cuda.emulation import Emulation
from qaq_core.kernels.cuda.weave import CudaWeaver
from qaq_core.storage import packed as packed_module
from tests.core import conformance
from tests.core.conformance import CPU, EXACT, Subject, make, relative
from tests.core.rows import normal

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile them for a CPU")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of two blocks of the kernels."""
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 256)


@cache
def weaver(block: int) -> CudaWeaver:
    return CudaWeaver(Emulation(block))


def subject(name: str, dim: int, packed: int, block: int = 128, **given: Any) -> Subject:
    """With rows in tiles of blocks of that many tokens."""
    return conformance.subject(name, dim, packed, weaver=weaver(block), **given)


def attention(mine: Subject, block: int = 128) -> CudaAttention:
    return CudaAttention(mine.quantizer.codec, CPU, Emulation(block))


def check(mine: Subject, group: int, one: CudaAttention | None = None, **given: Any) -> CudaAttention:
    """A decode step of the last layer by kernels alone."""
    one = one or attention(mine)
    mine.check(one, group, **given)
    assert not one.fallbacks
    return one


@pytest.mark.parametrize("dim", structures.HEAD_DIMS)
def test_every_head_dim_with_all_widths(dim: int) -> None:
    check(subject("progressive", dim, 150, heads=1, layers=1), 3, reductions=["mean_square"])


@pytest.mark.parametrize("group", [1, 5, 16])
def test_every_group_size(group: int) -> None:
    check(subject("progressive", 64, 61, heads=2, layers=1), group, reductions=["max"])


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_alone(width: int) -> None:
    mine = subject("progressive", 64, 70, heads=1, layers=1, widths=(width,))
    check(mine, 3, reductions=["max", "mean_square"][width % 2 :][:1])


def test_widths_whose_octets_have_all_numbers_of_planes() -> None:
    """Octets of a step that have less planes than the deepest one of it."""
    mine = subject("progressive", 128, 140, heads=1, layers=1, widths=(0, 1, 3, 5, 7, 10, 14))
    check(mine, 4, reductions=["max"])


@pytest.mark.parametrize("packed", [1, 4, 33, 128, 129, 300])
def test_every_length(packed: int) -> None:
    check(subject("progressive", 64, packed, heads=1, layers=1, widths=(0, 1, 4, 6)), 2, reductions=["max"])


def test_blocks_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 2048)
    mine = subject("progressive", 64, 1100, 1024, heads=1, layers=1, widths=(0, 1, 2, 3, 4, 6, 8, 12))
    check(mine, 4, attention(mine, 1024), reductions=["mean_square"])


@pytest.mark.parametrize("window", [1, 18, 150])
def test_sliding_window(window: int) -> None:
    check(subject("progressive", 64, 200, heads=1, layers=1), 2, sliding_window=window, reductions=["mean_square"])


@pytest.mark.parametrize("dim", [64, 128])
def test_own_means_and_rotation(dim: int) -> None:
    mine = subject("progressive", dim, 140, heads=2, layers=2, mean=1.0)
    check(mine, 3, layer=0, reductions=["max"])
    check(mine, 3, layer=1, reductions=["max"])


def test_one_scale_a_row() -> None:
    check(subject("gaussian", 64, 140, heads=1, layers=1), 3, reductions=["max"])


@pytest.mark.parametrize(
    ("size", "spread", "scaling"),
    [(1e-3, 0.0, 1.0), (300.0, 0.0, 0.1), (1.0, 0.0, 20.0), (1.0, 0.0, 1e-6), (1.0, 3.0, 0.1)],
)
def test_extreme_numbers(size: float, spread: float, scaling: float) -> None:
    mine = subject("progressive", 64, 130, heads=1, layers=1, size=size, spread=spread)
    check(mine, 3, scaling=scaling, reductions=["max"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_tokens(dtype: torch.dtype) -> None:
    for sinks, recent, packed in ((4, 1, 0), (0, 40, 50)):
        mine = subject("progressive", 64, packed, heads=1, layers=1, sinks=sinks, recent=recent, dtype=dtype)
        one = check(mine, 2, reductions=["max"])
        assert ("split" in one.launcher.launched) == (packed > 0)  # type: ignore[attr-defined]


def test_a_batch_is_each_sequence_by_itself() -> None:
    mine = [subject("progressive", 64, packed, layers=1) for packed in (0, 131, 48, 7, 300)]
    layers = [one.tokens(0) for one in mine]
    query, seen = normal(3, len(layers), 6, 1, 64), [torch.full((2, one.length), torch.nan) for one in layers]
    one = attention(mine[0])
    out = one.batch(query, layers, 0.1, 60, [StepObserver("mean_square", into) for into in seen])
    assert one.launcher.launched == ["prepare", "split", "merge", "observe"]  # type: ignore[attr-defined]
    for i, subject_of in enumerate(mine):
        p = subject_of.probabilities(query[i], 0, 0.1, 60)
        assert relative(out[i], subject_of.output(p, 0)) < EXACT
        assert relative(seen[i], p.view(2, 3, -1).square().mean(1)) < EXACT


def test_a_batch_of_several_kinds() -> None:
    """Without packed tokens, in another dtype, watched by nobody; some with means and rotations of their own."""
    mine = [
        subject("progressive", 64, 50, mean=1.0),
        subject("progressive", 64, 50, dtype=torch.float32, mean=-2.0),
        subject("progressive", 64, 0),
        subject("progressive", 64, 7),
    ]
    seen = torch.full((2, mine[1].length), torch.nan)
    query, layers = normal(3, 4, 4, 1, 64), [one.tokens(0) for one in mine]
    out = attention(mine[0]).batch(query, layers, 0.1, None, [None, StepObserver("max", seen), None, None])
    for i, one in enumerate(mine):
        assert relative(out[i], one.output(one.probabilities(query[i], 0, 0.1, None), 0)) < EXACT
    assert relative(seen, mine[1].probabilities(query[1], 0, 0.1, None).view(2, 2, -1).amax(1)) < EXACT


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_queries_in_half_precision(kind: torch.dtype) -> None:
    mine = subject("progressive", 64, 61, layers=1)
    query = mine.query(0, 2).to(kind)
    p = mine.probabilities(query.double(), 0, 0.1, None)
    assert relative(attention(mine)(query, mine.tokens(0), 0.1), mine.output(p, 0)) < EXACT


def test_nan_is_not_hidden() -> None:
    mine = subject("progressive", 64, 40)
    query = mine.query(0, 2).clone()
    query[1, 0, 5] = torch.nan
    seen = torch.zeros(2, mine.length)
    out = attention(mine)(query, mine.tokens(0), 0.1, None, StepObserver("max", seen))
    assert out.isnan().all(-1).squeeze(1).tolist() == [False, True, False, False]
    assert seen.isnan().all(1).tolist() == [True, False]


def test_rows_that_moved_are_attended_to_where_they_are() -> None:
    mine = Subject("progressive", 64, 200, layers=2, widths=(2, 4, 8), weaver=weaver(128))
    one, packed = attention(mine), mine.packed
    assert packed is not None
    query = mine.query(1, 2)
    one(query, mine.tokens(1), 0.1)
    index = torch.arange(0, packed.tags.numel(), 5)
    narrow = torch.ones(len(index), dtype=torch.uint8)
    packed.change(VALUE, index, narrow, torch.empty(0, dtype=torch.uint8), torch.zeros(len(index), dtype=torch.long))
    expected = make("reference", mine.quantizer.codec)(query, mine.tokens(1), 0.1)
    assert relative(one(query, mine.tokens(1), 0.1), expected.double()) < EXACT
    assert not one.fallbacks


def test_rows_by_width_go_to_the_reference() -> None:
    mine = conformance.subject("progressive", 64, 50, layers=1)
    one = attention(mine)
    one(mine.query(0, 2), mine.tokens(0), 0.1)
    assert one.fallbacks == {"rows that are not in tiles": 1}


@pytest.mark.parametrize(
    ("name", "dim", "group", "reason"),
    [
        ("progressive", 32, 2, "a head_dim of 32"),
        ("progressive", 64, 17, "17 query heads for a KV head"),
        ("uniform-head", 64, 2, "rows of the codec uniform, which have an offset"),
    ],
)
def test_what_they_do_not_take_goes_to_the_reference(name: str, dim: int, group: int, reason: str) -> None:
    mine = subject(name, dim, 20, heads=1, layers=1)
    one, query = attention(mine), mine.query(0, group)
    expected = make("reference", mine.quantizer.codec)(query, mine.tokens(0), 0.1)
    assert torch.equal(one(query, mine.tokens(0), 0.1), expected)
    assert one.fallbacks == {reason: 1}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_new_tokens_go_round_a_ring(kind: torch.dtype) -> None:
    """`prepare` writes their keys and values, `merge` reads them in the order of positions."""
    heads, dim, sinks, ring = 2, 64, 2, 5
    added = normal(1, 12, 2, heads, dim).to(kind)
    query = normal(2, 1, 2 * heads, dim).to(kind)
    exact, originals = torch.zeros(2, heads, sinks + ring, dim, dtype=torch.float16), torch.zeros_like(added)
    held = torch.zeros(3, heads, 4 * dim), torch.zeros(heads, 8, 4, 32), torch.zeros(heads, 2, 4)
    out, totals, run = torch.zeros(1, 2 * heads, dim), torch.zeros(2 * heads, 2), Emulation()
    for token in range(len(added)):
        one = structures.Sequence()
        step = structures.Step(ctypes.addressof(one), originals[token].data_ptr(), sinks=sinks, ring=ring)
        step.exact_tokens = min(token + 1, sinks + ring)
        step.ring_first = max(0, token + 1 - sinks - ring) % ring
        step.new_place = token if token < sinks else sinks + (token - sinks) % ring
        for side in range(2):
            one.exact[side], one.exact_stride[side] = exact[side].data_ptr(), exact.stride(1)
        batch = structures.Batch(ctypes.addressof(step), 0, 1, heads, 2, 1, 0, 0, 0, 0.1)
        prepare = structures.PrepareArgs(batch, structures.Layout(), query.data_ptr())
        prepare.added[0], prepare.added[1] = (part.data_ptr() for part in added[token])
        prepare.dtype = structures.DTYPES[kind]
        prepare.asked, prepare.framed, prepare.turned = (part.data_ptr() for part in held[0])
        prepare.fragments, prepare.factors = held[1].data_ptr(), held[2].data_ptr()
        run.launch("prepare", dim, (heads, 1, 1), 128, prepare)
        merge = structures.MergeArgs(batch, structures.Layout(), held[0].data_ptr())
        merge.out, merge.out_dtype, merge.totals = out.data_ptr(), 2, totals.data_ptr()
        run.launch("merge", dim, (heads, 1, 1), 128, merge)
        kept = [*range(min(sinks, token + 1)), *range(max(sinks, token + 1 - ring), token + 1)]
        keys, values = added[kept].half().double().permute(1, 2, 0, 3).repeat_interleave(2, 1)
        p = (query[0].double().unsqueeze(1) @ keys.mT * 0.1).softmax(-1)
        assert relative(out[0], (p @ values).squeeze(1)) < EXACT
    assert torch.equal(originals, added)


def test_structures_are_those_of_the_sources() -> None:
    kinds: Sequence[Any] = (
        *(structures.Sequence, structures.Step, structures.PrepareArgs, structures.SplitArgs),
        *(
            structures.MergeArgs,
            structures.ObserveArgs,
            structures.WeaveArgs,
            structures.RotateArgs,
            structures.EncodeArgs,
        ),
    )
    sizes = [emulation.library().qaq_sizes(i) for i in range(len(kinds))]
    assert sizes == [ctypes.sizeof(kind) for kind in kinds]


def test_half_precision_is_the_last_width() -> None:
    assert "HALF_WIDTH = 13" in (emulation.SOURCES / "structures.h").read_text()
    assert WIDTHS.index(HALF) == 13
