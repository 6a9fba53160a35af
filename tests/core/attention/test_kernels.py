"""Every implementation of decode attention against float64 over the same decoded numbers.

One at a time: Triton's interpreter takes half a second for what the others do in a millisecond, so it is shown
fewer cases, of every kind.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qaq_core.allocation.attention_statistics import Reduction, StepObserver
from qaq_core.attention import Attention, TritonAttention, cpu, triton
from qaq_core.attention.fallback import KernelWithFallback
from qaq_core.base.pages import VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.kernels import load_library
from qaq_core.storage import packed as packed_module
from tests.core.conformance import (
    EXACT,
    GROUPED,
    INSTRUCTION_SETS,
    QUANTIZERS,
    Subject,
    forced,
    kernels,
    make,
    relative,
    subject,
)
from tests.core.rows import normal

KERNELS = ("reference", *INSTRUCTION_SETS, "triton")


def each(names: str, cases: Any, few: Any = None, quick: Any = None) -> pytest.MarkDecorator:
    """Every implementation with every case; Triton with `few` of them if any are given, all slow but the `quick`."""

    def marks(kernel: str, case: Any) -> list[pytest.MarkDecorator]:
        return [pytest.mark.slow] if kernel == "triton" and quick is not None and case not in quick else []

    params = [
        pytest.param(kernel, *(case if isinstance(case, tuple) else (case,)), marks=marks(kernel, case))
        for kernel in KERNELS
        for case in (few if few is not None and kernel == "triton" else cases)
    ]
    return pytest.mark.parametrize(f"kernel,{names}", params, indirect=["kernel"])


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an implementation; the C++ ones with their instruction set forced."""
    if request.param not in kernels():
        pytest.skip(f"this machine has no {request.param}")
    with forced(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few tokens; Triton takes one at a time."""
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 48)
    monkeypatch.setattr(triton, "SPLIT", 64)
    monkeypatch.setattr(triton, "TILE", 64)


def reductions(one: Attention, turn: int) -> list[Reduction]:
    """Both, or the one whose turn it is."""
    both: list[Reduction] = ["max", "mean_square"]
    return both if not isinstance(one, TritonAttention) else [both[turn % 2]]


# Triton pads to a power of two: those, one above, one below, and one in between.
@each("dim", range(32, 257, 16), (32, 48, 80, 128, 144, 256), quick=(32, 80, 256))
def test_every_head_dim_and_group(kernel: str, dim: int) -> None:
    mine = subject("progressive", dim, 61, heads=1 if kernel == "triton" else 2)
    one = make(kernel, mine.quantizer.codec)
    # Every head_dim with four of the sixteen group sizes, and every group size with several of the head_dims.
    for group in (dim // 16,) if kernel == "triton" else range(1 + dim // 16 % 4, 17, 4):
        mine.check(one, group, reductions=reductions(one, group)[:1])


# Widths alone in a pool, with one of these each; test_every_length and others mix all widths.
SHAPES = (("progressive", 32), ("progressive", 80), ("gaussian", 64))


@each(
    "name,dim,width",
    [(*SHAPES[i % len(SHAPES)], width) for i, width in enumerate(WIDTHS)],
    [("progressive", 32, 0), ("progressive", 32, 3), ("gaussian", 32, HALF)],
)
def test_every_width(kernel: str, name: str, dim: int, width: int) -> None:
    mine = subject(name, dim, 61, widths=(width,))
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=3, reductions=reductions(one, width))


@each("name", QUANTIZERS, ["gaussian", "uniform-head", "uniform-layer", "normal-token"])
def test_every_codec(kernel: str, name: str) -> None:
    mine = subject(name, 32, 61)
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=3, reductions=reductions(one, 0))


@each("name", GROUPED, ["normal-head"])
def test_outliers(kernel: str, name: str) -> None:
    mine = subject(name, 32, 60, outliers=0.1)
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=2)
    if isinstance(one, KernelWithFallback):
        assert one.fallbacks["outliers"] >= 2


@each("packed", [1, 7, 9, 33, 47, 48, 49, 96], [1, 49])
def test_every_length(kernel: str, packed: int) -> None:
    mine = subject("progressive", 32, packed)
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=2, reductions=reductions(one, packed))


@each("widths", [[1, 2, 3], [4], [*WIDTHS]], [])
def test_many_rows_of_a_width(kernel: str, widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are full, and positions that are far apart; more query heads than stand together."""
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 600)
    mine = subject("progressive", 32, 700, heads=1, widths=tuple(widths))
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=5, reductions=reductions(one, 0))


@each("group", [17, 21], [])
def test_very_many_query_heads(kernel: str, group: int) -> None:
    mine = subject("progressive", 80, 61, heads=1)
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group, reductions=reductions(one, group))


WINDOWS = [(sinks, recent) for sinks, recent in ((4, 1), (4, 40), (1, 16), (0, 16))]


@each("packed,width", [(35, 1), (33, 3), (47, 1)], [(35, 1)])
def test_few_rows_after_a_full_tile(kernel: str, packed: int, width: int) -> None:
    """Their few bytes are the pool's last: what reads rows 16 bytes at a time may not read beyond them."""
    mine = subject("progressive", 32, packed, widths=(width,))
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=2, reductions=reductions(one, packed))


TYPES = (torch.float16, torch.bfloat16, torch.float32)


@each(
    "dtype,sinks,recent,packed",
    [
        (dtype, sinks, recent, 50 * ((i + j) % 2))  # both lengths with every dtype and with every window
        for i, dtype in enumerate(TYPES)
        for j, (sinks, recent) in enumerate(WINDOWS)
    ],
    [(torch.bfloat16, 0, 1, 40), (torch.float32, 4, 70, 0)],
)
def test_exact_tokens(kernel: str, dtype: torch.dtype, sinks: int, recent: int, packed: int) -> None:
    mine = subject("progressive", 32, packed, sinks=sinks, recent=recent, dtype=dtype)
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=2, reductions=reductions(one, recent))


@each(
    "name,sliding_window",
    [("progressive", sliding_window) for sliding_window in (1, 17, 18, 40, 67, 120, 1000)]
    + [("uniform-layer", sliding_window) for sliding_window in (17, 67)],
    [("progressive", 18), ("uniform-layer", 67)],
)
def test_sliding_window(kernel: str, name: str, sliding_window: int) -> None:
    mine = subject(name, 32, 100)
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=2, sliding_window=sliding_window, reductions=reductions(one, sliding_window))


@each(
    "size,spread,scaling",
    [(1e-3, 0.0, 1.0), (300.0, 0.0, 0.1), (1.0, 0.0, 20.0), (1.0, 0.0, 1e-6), (1.0, 3.0, 0.1)],
    [(1.0, 3.0, 0.1)],
)
def test_extreme_numbers(kernel: str, size: float, spread: float, scaling: float) -> None:
    mine = subject("progressive", 64, 100, size=size, spread=spread)
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=3, scaling=scaling, reductions=reductions(one, 0))


@each("packed", [131])
def test_many_splits_and_tiles(kernel: str, packed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "SPLIT", 32)
    monkeypatch.setattr(triton, "TILE", 16)
    mine = subject("progressive", 32, packed, heads=1)
    one = make(kernel, mine.quantizer.codec)
    mine.check(one, group=2, reductions=reductions(one, 0))


@each("group", [2])
def test_rows_that_moved(kernel: str, group: int) -> None:
    mine = Subject("progressive", 64, 61, widths=(2, 4, 8))
    one, packed = make(kernel, mine.quantizer.codec), mine.packed
    assert packed is not None
    index = torch.arange(0, packed.tags.numel(), 5)
    narrow = torch.ones(len(index), dtype=torch.uint8)
    packed.change(VALUE, index, narrow, torch.empty(0, dtype=torch.uint8), torch.zeros(len(index), dtype=torch.long))
    query = mine.query(1, group)
    expected = make("reference", mine.quantizer.codec)(query, mine.tokens(1), 0.1)
    assert relative(one(query, mine.tokens(1), 0.1), expected.double()) < 1e-3


@each("threads", [1, 3], [1])
def test_a_batch_is_each_sequence_by_itself(kernel: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SINGLE_THREAD_BELOW", 0)
    lengths = (0, 50, 7) if kernel == "triton" else (0, 131, 48, 7, 300)
    layers = [subject("progressive", 64, packed).tokens(1) for packed in lengths]
    one, before = make(kernel, subject("progressive", 64, 7).quantizer.codec), torch.get_num_threads()
    reference = make("reference", subject("progressive", 64, 7).quantizer.codec)
    query = normal(3, len(layers), 6, 1, 64)
    seen = [torch.full((2, tokens.length), torch.nan) for tokens in layers]
    torch.set_num_threads(threads)
    try:
        out = one.batch(query, layers, 0.1, 60, [StepObserver("mean_square", into) for into in seen])
    finally:
        torch.set_num_threads(before)
    for i, tokens in enumerate(layers):
        alone = torch.full_like(seen[i], torch.nan)
        expected = reference(query[i], tokens, 0.1, 60, StepObserver("mean_square", alone))
        assert relative(out[i], expected.double()) < 1e-3
        assert relative(seen[i], alone.double()) < 1e-3


@each("dtype", [torch.float32])
def test_a_batch_of_several_kinds(kernel: str, dtype: torch.dtype) -> None:
    """Without packed tokens, in another dtype, watched by nobody, a prompt's end; some with means of their own."""
    mine = [
        subject("progressive", 32, 50, mean=1.0),
        subject("progressive", 32, 50, dtype=dtype, mean=-2.0),
        subject("progressive", 32, 0),
        subject("progressive", 32, 7),
    ]
    seen = torch.full((2, mine[1].length), torch.nan)
    shown: list[torch.Tensor] = []
    observers = [None, StepObserver("max", seen), None, lambda p, first: shown.append(p)]
    query, layers = normal(3, 4, 4, 1, 32), [one.tokens(0) for one in mine]
    out = make(kernel, mine[0].quantizer.codec).batch(query, layers, 0.1, None, observers)
    for i, one in enumerate(mine):
        p = one.probabilities(query[i], 0, 0.1, None)
        assert relative(out[i], one.output(p, 0)) < EXACT
    p = mine[1].probabilities(query[1], 0, 0.1, None).view(2, 2, -1)
    assert relative(seen, p.amax(1)) < EXACT
    assert shown[0].shape == (2, 2, 1, mine[3].length)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@each("dim", [32])
def test_nan_is_not_hidden(kernel: str, dim: int) -> None:
    mine = subject("progressive", dim, 40)
    query = mine.query(0, 2).clone()
    query[1, 0, 5] = torch.nan
    seen = torch.zeros(2, mine.length)
    out = make(kernel, mine.quantizer.codec)(query, mine.tokens(0), 0.1, None, StepObserver("max", seen))
    assert out.isnan().all(-1).squeeze(1).tolist() == [False, True, False, False]
    assert seen.isnan().all(1).tolist() == [True, False]
    assert not seen[1].isnan().any()


@each("n", [5])
def test_prompts_that_are_watched_go_to_the_reference(kernel: str, n: int) -> None:
    """What a caller's own observer reads of probabilities, nobody knows. Others are in test_prompts.py."""
    mine = subject("uniform-head", 32, 60)
    one, reference = make(kernel, mine.quantizer.codec), make("reference", mine.quantizer.codec)
    query, tokens, shown = mine.query(0, 2, n), mine.tokens(0), list[int]()
    out = one(query, tokens, 0.1, None, lambda p, first: shown.append(p.shape[2]))
    assert torch.equal(out, reference(query, tokens, 0.1))
    assert shown == [n]
    if isinstance(one, KernelWithFallback):
        assert one.fallbacks["a prompt"] >= 1


def test_an_instruction_set_that_is_not_there_changes_nothing() -> None:
    loaded = load_library()
    if loaded is None:
        pytest.skip("the C++ library is not built")
    before = loaded.qaq_isa()
    assert before.decode() in INSTRUCTION_SETS
    assert loaded.qaq_use(b"mmx") == -1
    assert loaded.qaq_isa() == before


@pytest.mark.slow
def test_the_best_instruction_set_that_runs_here_is_chosen() -> None:
    if load_library() is None:
        pytest.skip("the C++ library is not built")
    code = "from qaq_core.kernels import load_library; print(load_library().qaq_isa().decode())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == next(name for name in INSTRUCTION_SETS if name in kernels())
