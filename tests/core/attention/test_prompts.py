"""Attention of a prompt's queries in C++, and what they observed, against float64 arithmetic over the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qaq_core.allocation.attention_statistics import (
    AttentionWindow,
    DecayingMeanSquare,
    LayerObserver,
    NoStatistic,
    PromptMeans,
    PromptObserver,
)
from qaq_core.attention import CpuAttention, LayerTokens, cpu
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.quantization.codecs import GaussianCodec
from qaq_core.storage import packed as packed_module
from tests.core.conformance import (
    CPU,
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

TYPES = (torch.float16, torch.bfloat16, torch.float32)
HERE = tuple(kernel for kernel in INSTRUCTION_SETS if kernel in kernels())


@pytest.fixture(params=INSTRUCTION_SETS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in HERE:
        pytest.skip(f"this machine has no {request.param}")
    with forced(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few packed tokens."""
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 48)


def attention(codec: Any) -> CpuAttention:
    """The one in C++, with its count of fallbacks at 0."""
    one = make("cpu", codec)
    assert isinstance(one, CpuAttention)
    one.fallbacks.clear()
    return one


def check(
    mine: Subject,
    n: int,
    group: int = 3,
    layer: int = 0,
    sliding_window: int | None = None,
    scaling: float = 0.1,
    summed: int = 9,
    distance: int = 4,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Output, sums and peaks of the last n positions."""
    query = mine.query(layer, group, n).to(dtype)
    p = mine.probabilities(query, layer, scaling, sliding_window)
    shares = p.view(mine.heads, group, n, mine.length).square().mean(1)
    seen = observer(mine, min(n, summed), distance)
    one = attention(mine.quantizer.codec)
    first = mine.length - n
    got = one(query, mine.tokens(layer), scaling, sliding_window, LayerObserver(seen, layer, first))
    assert not one.fallbacks
    assert relative(got, mine.output(p, layer)) < EXACT
    assert relative(seen.sums[layer], shares[:, -summed:].sum(1)) < EXACT
    far = shares.tril(first - distance).amax(1)
    assert bool((seen.peaks[layer][far == 0] < 1e-30).all())
    assert relative(seen.peaks[layer], far) < EXACT if far.any() else True
    assert not seen.sums[1 - layer].any()


def observer(mine: Subject, summed: int, distance: int) -> PromptMeans:
    statistic = DecayingMeanSquare(queries=summed, distance=distance)
    return PromptMeans(statistic, max(2, mine.layers), mine.heads, mine.length, summed, CPU)


@pytest.mark.parametrize("dim", range(32, 257, 16))
def test_every_head_dim(kernel: str, dim: int) -> None:
    check(subject("progressive", dim, 61), n=13, group=1 + dim // 16 % 4, layer=1)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 16])
def test_every_group(kernel: str, group: int) -> None:
    check(subject("progressive", 32, 61, recent=40), n=30, group=group)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 17, 24, 25, 47, 48, 49, 63, 64, 65, 128, 131])
def test_every_number_of_queries(kernel: str, n: int) -> None:
    """Blocks of queries and tiles of tokens that are full, begun, and just over."""
    check(subject("progressive", 32, 0, recent=131 - 4, dtype=torch.float32), n)
    check(subject("progressive", 32, 20, recent=131), n)


@pytest.mark.parametrize("packed", [1, 47, 48, 49, 64, 96, 200])
def test_every_number_of_packed_tokens(kernel: str, packed: int) -> None:
    check(subject("progressive", 32, packed, recent=30), n=25)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_codec(kernel: str, name: str) -> None:
    check(subject(name, 32, 61), n=15)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(kernel: str, width: int) -> None:
    check(subject("progressive", 32, 61, widths=(width,)), n=15)


def test_a_sequence_with_means_and_axes_of_its_own(kernel: str) -> None:
    check(subject("progressive", 64, 61, mean=1.0), n=15)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("packed", [0, 50])
def test_every_type(kernel: str, dtype: torch.dtype, packed: int) -> None:
    mine = subject("progressive", 32, packed, sinks=0, recent=33, dtype=dtype)
    for queries in TYPES:
        check(mine, n=33, dtype=queries)


@pytest.mark.parametrize("sliding_window", [1, 2, 17, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("packed", [0, 70])
def test_sliding_window(kernel: str, sliding_window: int, packed: int) -> None:
    mine = subject("progressive", 32, packed, recent=150 - packed, dtype=torch.float32)
    check(mine, n=70, sliding_window=sliding_window)


@pytest.mark.parametrize(("summed", "distance"), [(1, 1), (200, 32), (24, 64), (60, 0), (5, 500)])
def test_every_share(kernel: str, summed: int, distance: int) -> None:
    mine = subject("progressive", 32, 0, recent=150, dtype=torch.float32)
    check(mine, n=154, summed=summed, distance=distance)
    check(mine, n=60, summed=summed, distance=distance)


@pytest.mark.parametrize(
    ("size", "spread", "scaling"), [(1e-3, 0.0, 1.0), (300.0, 0.0, 0.1), (1.0, 0.0, 20.0), (1.0, 3.0, 0.1)]
)
def test_extreme_numbers(kernel: str, size: float, spread: float, scaling: float) -> None:
    check(subject("progressive", 64, 100, size=size, spread=spread), n=15, scaling=scaling)


@pytest.mark.parametrize("chunks", [(100,), (1, 99), (64, 36), (37, 1, 62), (25,) * 4])
@pytest.mark.parametrize("sliding_window", [None, 30])
def test_chunks_do_not_show(kernel: str, chunks: tuple[int, ...], sliding_window: int | None) -> None:
    """A prompt over its own beginning, as it arrives: the sums too are those of its last queries."""
    query, rows = normal(0, 6, 100, 32), normal(1, 2, 2, 120, 32)
    one, reference = attention(GaussianCodec()), make("reference", GaussianCodec())
    statistic = DecayingMeanSquare(queries=40, distance=8)
    seen, expected = (PromptMeans(statistic, 1, 2, 100, 40, CPU) for _ in range(2))
    whole = reference(query, tokens(rows, 100), 0.3, sliding_window, LayerObserver(expected, 0, 0))
    first, parts = 0, []
    for n in chunks:
        part = query[:, first : first + n]
        watch = LayerObserver(seen, 0, first)
        parts.append(one(part, tokens(rows, first + n), 0.3, sliding_window, watch))
        first += n
    assert relative(torch.cat(parts, 1), whole.double()) < EXACT
    assert torch.equal(torch.cat(parts, 1), one(query, tokens(rows, 100), 0.3, sliding_window))
    assert relative(seen.sums, expected.sums.double()) < EXACT
    assert relative(seen.peaks, expected.peaks.double()) < EXACT


def tokens(rows: torch.Tensor, stop: int) -> LayerTokens:
    """The first tokens of rows [2, kv_heads, n, head_dim]."""
    return LayerTokens(0, rows[KEY][:, :stop], rows[VALUE][:, :stop], min(4, stop), None)


@pytest.mark.parametrize("packed", [0, 150])
def test_results_do_not_depend_on_threads(kernel: str, packed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SINGLE_THREAD_BELOW", 0)
    mine = subject("progressive", 32, packed, recent=200, dtype=torch.float32)
    one, query, before = attention(mine.quantizer.codec), mine.query(0, 3, 200), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            seen = observer(mine, 60, 8)
            out = one(query, mine.tokens(0), 0.1, None, LayerObserver(seen, 0, mine.length - 200))
            made.append((out, seen.sums, seen.peaks))
    finally:
        torch.set_num_threads(before)
    for alone, together in zip(*made, strict=True):
        assert torch.equal(alone, together)


def test_queries_of_any_strides(kernel: str) -> None:
    """As models pass them: [n, heads, head_dim] transposed, a part of a wider product, or every other number."""
    mine = subject("progressive", 32, 30, recent=20)
    one, query = attention(mine.quantizer.codec), mine.query(0, 2, 20)
    expected = one(query, mine.tokens(0), 0.1)
    wide = torch.zeros(20, 3, 4, 32)
    wide[:, 1] = query.transpose(0, 1)
    for same in (query.transpose(0, 1).contiguous().transpose(0, 1), wide[:, 1].transpose(0, 1)):
        assert torch.equal(one(same, mine.tokens(0), 0.1), expected)
    spread = torch.zeros(4, 20, 64)
    spread[..., ::2] = query
    assert torch.equal(one(spread[..., ::2], mine.tokens(0), 0.1), expected)


def test_nan_is_not_hidden(kernel: str) -> None:
    mine = subject("progressive", 32, 40)
    query = mine.query(0, 2, 12).clone()
    query[1, 5, 3] = torch.nan
    out = attention(mine.quantizer.codec)(query, mine.tokens(0), 0.1)
    lost = out.isnan().any(-1)
    assert bool(lost[1, 5])
    assert int(lost.sum()) == 1


@pytest.mark.parametrize("first", [0, 50, 58])
def test_another_statistic_is_shown_the_queries_that_it_reads(kernel: str, first: int) -> None:
    """The attention window reads five queries, the reference computes no others."""
    rows, query = normal(1, 2, 2, 60, 32), normal(0, 6, 60 - first, 32)
    one, reference = attention(GaussianCodec()), make("reference", GaussianCodec())
    states = []
    for kind in (one, reference):
        seen = AttentionWindow(5).prompt(1, 2, 60, 60, CPU)
        kind(query, tokens(rows, 60), 0.3, None, LayerObserver(seen, 0, first))
        states.append(seen.state().int())
    assert int((states[0] - states[1]).abs().max()) <= 1
    assert one.fallbacks["a prompt"] == 1


def test_no_statistic_is_shown_nothing(kernel: str) -> None:
    seen: PromptObserver = NoStatistic().prompt(1, 2, 60, 60, CPU)
    one = attention(GaussianCodec())
    one(normal(0, 6, 60, 32), tokens(normal(1, 2, 2, 60, 32), 60), 0.3, None, LayerObserver(seen, 0, 0))
    assert not one.fallbacks


@pytest.mark.parametrize("name", GROUPED[:1])
def test_outliers_go_to_the_reference(kernel: str, name: str) -> None:
    mine = subject(name, 32, 60, outliers=0.1)
    one, reference = attention(mine.quantizer.codec), make("reference", mine.quantizer.codec)
    query = mine.query(0, 2, 5)
    assert torch.equal(one(query, mine.tokens(0), 0.1), reference(query, mine.tokens(0), 0.1))
    assert one.fallbacks["outliers"] == 1


@pytest.mark.skipif(not HERE, reason="the C++ library is not built")
@settings(max_examples=30)
@given(
    name=st.sampled_from(QUANTIZERS),
    dim=st.integers(2, 16),
    packed=st.one_of(st.just(0), st.integers(1, 110)),
    sinks=st.integers(0, 5),
    recent=st.integers(1, 150),
    dtype=st.sampled_from(TYPES),
    group=st.integers(1, 9),
    sliding_window=st.one_of(st.none(), st.integers(1, 200)),
    summed=st.integers(1, 100),
    distance=st.integers(0, 70),
    data=st.data(),
)
def test_random_prompts(dim: int, group: int, sliding_window: int | None, data: st.DataObject, **given: Any) -> None:
    summed, distance = given.pop("summed"), given.pop("distance")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "BLOCK_TOKENS", 48)
        mine = Subject(dim=16 * dim, layers=2, **given)
        n = data.draw(st.integers(1, min(mine.length, given["recent"] + 3)))
        for kernel in HERE:
            with forced(kernel):
                check(mine, n, group, sliding_window=sliding_window, summed=summed, distance=distance)
