"""Encoding in C++ makes the very bits that torch makes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.kernels import encode, load_library, make_encoder
from qaq_core.kernels.encode import NativeEncoder
from qaq_core.quantization.codecs import GaussianCodec, UniformCodec
from qaq_core.quantization.codecs.base import Cells
from qaq_core.quantization.encoder import TorchEncoder
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform, LinearTransform
from tests.core.conformance import INSTRUCTION_SETS
from tests.core.rows import HEAD_DIMS, linear_transform, normal, page_shape, quantizers, request, rotated

LAYERS, HEADS = 3, 2
CPU = torch.device("cpu")
EVERY = torch.tensor(WIDTHS, dtype=torch.uint8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    loaded = load_library()
    if loaded is None:
        pytest.skip("the C++ library is not built")
    before = loaded.qaq_isa()
    if loaded.qaq_use(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield
    loaded.qaq_use(before)


@cache
def pair(name: str, dim: int) -> tuple[Quantizer, Quantizer]:
    """In torch and in C++."""
    named = quantizers(LAYERS, HEADS, dim)
    named["gaussian"] = Quantizer(named["balanced"].transform, GaussianCodec())
    named["turned"] = rotated(named["balanced"])
    return named[name].using(make_encoder("reference")), named[name].using(make_encoder("cpu"))


def steps(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Widths held and widths wanted, each pair at random."""
    drawn = torch.randint(0, len(WIDTHS), (2, n), generator=torch.Generator().manual_seed(seed))
    have, want = EVERY[drawn].sort(0).values
    return torch.where(want == HALF, 0, have), want


def agree(name: str, dim: int, side: int, originals: torch.Tensor, start: int, seed: int) -> None:
    """Rows, meta bytes and bytes of any widths."""
    reference, native = pair(name, dim)
    rows = reference.rows(side, originals, start)
    assert torch.equal(native.rows(side, originals, start), rows)
    meta = reference.meta(rows)
    assert torch.equal(native.meta(rows), meta)
    have, want = steps(seed, rows[..., 0].numel())
    full = meta.expand(*rows.shape[:3], -1).reshape(len(want), -1)
    expected, begin = reference.encode_each(side, rows, full, have, want)
    got, places = native.encode_each(side, rows, full, have, want)
    assert torch.equal(places, begin)
    assert torch.equal(got, expected)


@given(
    seed=st.integers(0, 1 << 30),
    dim=st.sampled_from(HEAD_DIMS),
    side=st.sampled_from((KEY, VALUE)),
    dtype=st.sampled_from(DTYPES),
    n=st.sampled_from((1, 2, 7, 48, 49, 103)),
    log=st.floats(-12, 8),
)
@pytest.mark.parametrize("name", ["balanced", "turned", "gaussian", "uniform-layer", "normal-head"])
def test_every_quantizer(name: str, seed: int, dim: int, side: int, dtype: torch.dtype, n: int, log: float) -> None:
    originals = (normal(seed, LAYERS, HEADS, n, dim) * 2.0**log).to(dtype)
    agree(name, dim, side, originals, 5, seed)


@pytest.mark.parametrize(
    ("name", "dim"),
    [("balanced", dim) for dim in HEAD_DIMS]
    + [(name, dim) for name in ("turned", "gaussian", "normal-layer") for dim in (80, 128)],
)
def test_rows_that_are_nothing_like_typical_ones(name: str, dim: int) -> None:
    zeros = torch.zeros(LAYERS, HEADS, 7, dim)
    one = zeros.clone()
    one[..., 3] = 900.0
    mean = torch.full_like(zeros, 1.25)
    tiny = normal(0, LAYERS, HEADS, 7, dim) * 1e-40
    for originals in (zeros, one, mean, tiny):
        for side in (KEY, VALUE):
            agree(name, dim, side, originals, 0, dim)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", ["balanced", "turned", "uniform-layer"])
def test_requests(name: str, seed: int, dim: int, dtype: torch.dtype) -> None:
    """Rows of anywhere, in any order, as the cache service gets them."""
    reference, native = pair(name, dim)
    have, want = (part.numpy() for part in steps(seed, 150))
    have, want = have[want > have], want[want > have]
    n, rng = len(have), np.random.default_rng(seed)
    layer, head = rng.integers(0, LAYERS, n), rng.integers(0, HEADS, n)
    meta = torch.from_numpy(rng.integers(90, 120, (LAYERS, HEADS, 300, reference.meta_bytes), dtype=np.uint8))
    asked = request(
        page_shape(LAYERS, HEADS, dim),
        meta,
        layer,
        head,
        rng.integers(0, 300, n),
        rng.integers(0, 2, n),
        have,
        want,
    )
    originals = (normal(seed, n, dim) * 3).to(dtype)
    assert np.array_equal(native.requantize(asked, originals), reference.requantize(asked, originals))


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), side=st.sampled_from((KEY, VALUE)))
def test_a_row_is_the_same_bits_alone_and_in_a_block(seed: int, dim: int, side: int) -> None:
    encoder = pair("balanced", dim)[1].encoder(CPU)
    originals, n, start = normal(seed, LAYERS, HEADS, 61, dim) * 5, 40, 11
    block, _ = encoder.rows(side, originals, start)
    pick = torch.randperm(block[..., 0].numel(), generator=torch.Generator().manual_seed(seed))[:n]
    layer, head, token = torch.unravel_index(pick, block.shape[:3])
    at = originals[layer, head, token]
    assert torch.equal(encoder.rows_at(side, at, layer, head, token + start), block[layer, head, token])
    first = encoder.rows_at(side, at[:1], layer[:1], head[:1], token[:1] + start)
    assert torch.equal(first[0], block[layer[0], head[0], token[0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_originals_within_a_larger_buffer(dtype: torch.dtype) -> None:
    buffer = normal(0, LAYERS, 2, HEADS, 90, 64).to(dtype)
    for side in (KEY, VALUE):
        view = buffer[:, side, :, 4:76]
        agree("balanced", 64, side, view, 4, side)
        rows = pair("balanced", 64)[1].rows(side, view, 4)
        part = rows[:, :, 10:50]  # as a block of the packed tokens takes them
        meta = pair("balanced", 64)[0].meta(rows)[:, :, 10:50].reshape(-1, 1)
        have, want = steps(1, len(meta))
        both = [one.encode_each(side, part, meta, have, want)[0] for one in pair("balanced", 64)]
        assert torch.equal(both[0], both[1])


def test_spent_originals_are_written_over() -> None:
    native, whole = pair("balanced", 64)[1], normal(0, LAYERS, 2, HEADS, 90, 64)
    expected = [native.rows(side, whole[:, side, :, 4:], 4) for side in (KEY, VALUE)]
    assert [native.rows(side, whole[:, side, :, 4:], 4, overwrite=True).data_ptr() for side in (KEY, VALUE)] == [
        whole[:, side, :, 4:].data_ptr() for side in (KEY, VALUE)
    ]
    assert torch.equal(whole[:, :, :, 4:], torch.stack(expected, 1))
    half = whole.half()
    native.rows(KEY, half[:, KEY], 0, overwrite=True)
    assert torch.equal(half, whole.half())


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "SINGLE_THREAD_BELOW", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        agree("balanced", 64, KEY, normal(0, LAYERS, HEADS, 300, 64), 5, 0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("threads", [1, 3])
def test_nan_and_infinity_are_refused_naming_the_first_layer(
    bad: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "SINGLE_THREAD_BELOW", 0)
    originals = normal(0, LAYERS, HEADS, 60, 32)
    originals[1, 1, 59, 31] = originals[2, 0, 0, 0] = bad
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for side, name in ((KEY, "key"), (VALUE, "value")):
            with pytest.raises(QuantizationError, match=f"layer 1: {name}"):
                pair("balanced", 32)[1].rows(side, originals, 0)
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_too_large_are_refused_naming_the_layer() -> None:
    originals = normal(0, LAYERS, HEADS, 60, 32)
    originals[2, 0, 5] = 3e38
    native = pair("balanced", 32)[1]
    with pytest.raises(QuantizationError, match="layer 2"):
        native.meta(native.rows(VALUE, originals, 0))


class OneScale(Cells):
    """Cells of any edges; rows are their own units."""

    name, meta_bytes, split = "one", 1, 0

    def __init__(self, edges: torch.Tensor) -> None:
        self.edges = edges

    def order(self, side: int, head_dim: int) -> torch.Tensor:
        return GaussianCodec().order(side, head_dim)

    def affine(self, meta: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ones(*meta.shape), None

    def settings(self) -> dict[str, object]:
        return {"name": self.name}


def coded(codec: object, units: torch.Tensor) -> tuple[torch.Tensor, Quantizer]:
    """The 8-bit rows that C++ makes of units."""
    quantizer = Quantizer(IdentityTransform(), codec, make_encoder=make_encoder("cpu"))  # type: ignore[arg-type]
    return quantizer.encode(KEY, units, torch.zeros(len(units), 1, dtype=torch.uint8), 0, 16), quantizer


@given(seed=st.integers(0, 1 << 30), uneven=st.floats(0, 2), shift=st.floats(-3, 3))
def test_numbers_on_and_beside_edges_get_the_cells_that_torch_gives_them(
    seed: int, uneven: float, shift: float
) -> None:
    steps = (uneven * normal(seed, 255)).clamp(-1.5, 1.5).exp()
    edges = steps.cumsum(0) / steps.sum() * 8 + shift
    ends = torch.tensor([-torch.inf, -1e30, 0.0, 1e30, torch.inf])
    near = [torch.nextafter(edges, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    units = torch.cat([edges, *near, ends, normal(seed, 14) * 3]).view(-1, 16)
    rows, quantizer = coded(OneScale(edges), units)
    encoder = quantizer.encoder(CPU)
    assert isinstance(encoder, NativeEncoder)
    assert not encoder.fallbacks
    codes = torch.bucketize(units, edges).to(torch.uint8)
    assert torch.equal(quantizer.layout(KEY, 16).unpack(rows), codes)


def test_edges_that_are_too_uneven_go_to_torch() -> None:
    edges = torch.cat([torch.arange(254) * 1e-7, torch.tensor([1.0])])
    units = torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) * 1e-5
    rows, quantizer = coded(OneScale(edges), units)
    assert torch.equal(quantizer.layout(KEY, 32).unpack(rows), torch.bucketize(units, edges).to(torch.uint8))
    assert counted(quantizer) == ["codes of the codec's own"]


def counted(quantizer: Quantizer) -> list[str]:
    encoder = quantizer.encoder(CPU)
    assert isinstance(encoder, NativeEncoder)
    return list(encoder.fallbacks)


def test_halves_are_rounded_to_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (4000, 32), generator=generator).int()
    small = torch.randint(0x30000000, 0x48000000, (4000, 32), generator=generator).int()
    units = torch.cat([bits, small, -small]).view(torch.float32)
    units = torch.cat([units.nan_to_num(0.0), units.half().float().nan_to_num(0.0) + 2.0**-12])
    meta = torch.zeros(len(units), 1, dtype=torch.uint8)
    codec = OneScale(GaussianCodec().edges)
    quantizer = Quantizer(IdentityTransform(), codec, make_encoder=make_encoder("cpu"))  # type: ignore[arg-type]
    made = quantizer.encode(KEY, units, meta, 0, HALF)
    assert torch.equal(made.view(torch.float16), units.half())


class Coarse(UniformCodec):
    """Codes of a codec's own."""

    def codes(self, units: torch.Tensor) -> torch.Tensor:
        return super().codes(units) & 0xF0


class Doubled(LinearTransform):
    """Rows of a frame's own."""

    def rows(self, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
        return 2 * super().rows(side, originals, start)


def test_what_does_something_in_its_own_way_goes_to_torch_and_is_counted() -> None:
    originals = normal(0, LAYERS, HEADS, 9, 32)
    doubled = Doubled(**linear_transform(LAYERS, HEADS, 32).tensors())
    own = Quantizer(doubled, Coarse("head"), make_encoder=make_encoder("cpu"))
    rows = own.rows(KEY, originals, 3)
    assert torch.equal(rows, 2 * Quantizer(linear_transform(LAYERS, HEADS, 32), Coarse("head")).rows(KEY, originals, 3))
    meta = own.meta(rows).view(-1, 4)
    made, _ = own.encode_each(KEY, rows, meta, *steps(0, len(meta)))
    assert torch.equal(made, own.using(make_encoder("reference")).encode_each(KEY, rows, meta, *steps(0, len(meta)))[0])
    assert counted(own) == ["rows of the transform's own", "codes of the codec's own"]


def test_places_and_shapes_that_do_not_fit_are_refused() -> None:
    encoder = pair("balanced", 32)[1].encoder(CPU)
    nothing, one = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    for layer, head in ((LAYERS * one, nothing), (nothing, HEADS * one)):
        with pytest.raises(IndexError):
            encoder.rows_at(KEY, torch.zeros(1, 32), layer, head, nothing)
    with pytest.raises(RuntimeError):
        encoder.rows_at(KEY, torch.zeros(1, 64), nothing, nothing, nothing)
    with pytest.raises(RuntimeError):
        encoder.rows(KEY, torch.zeros(LAYERS, HEADS, 1, 64), 0)
    meta, widths = torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([[4], [2]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="wider"):
        pair("balanced", 32)[1].encode_each(KEY, torch.zeros(1, 32), meta, widths[0], widths[1])


def test_nothing_is_made_of_nothing() -> None:
    native, none = pair("balanced", 32)[1], torch.zeros(0, dtype=torch.uint8)
    rows = native.rows(KEY, torch.zeros(LAYERS, HEADS, 0, 32), 5)
    assert (rows.shape, native.meta(rows).shape) == ((LAYERS, HEADS, 0, 32), (LAYERS, HEADS, 0, 1))
    assert len(native.encode_each(KEY, rows, none.view(0, 1), none, none)[0]) == 0


def test_the_kernel_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Quantizer(IdentityTransform(), GaussianCodec())
    assert isinstance(plain.encoder(CPU), TorchEncoder)
    chosen = plain.using(make_encoder())
    assert isinstance(chosen.encoder(CPU), NativeEncoder)
    assert isinstance(chosen.encoder(torch.device("meta")), TorchEncoder)
    assert isinstance(plain.using(make_encoder("reference")).encoder(CPU), TorchEncoder)
    assert plain.using(make_encoder("cpu")).id == plain.id
    monkeypatch.setenv("QAQ_KERNEL", "reference")
    assert isinstance(plain.using(make_encoder()).encoder(CPU), TorchEncoder)
    with pytest.raises(ConfigError, match="quick"):
        plain.using(make_encoder("quick")).encoder(CPU)
