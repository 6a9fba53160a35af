"""Every implementation of decode attention against float64 over the same dequantized numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from qaq_core import attention, codecs, native
from qaq_core import packed as packed_module
from qaq_core.attention import Attention, CpuAttention, LayerTokens, ReferenceAttention, cpu
from qaq_core.codecs import Codec, GaussianCodec, NormalCodec, ProgressiveCodec, UniformCodec
from qaq_core.errors import ConfigError
from qaq_core.frames import LinearFrame, PlainFrame, rotate_pairs
from qaq_core.native import library
from qaq_core.outliers import split_outliers
from qaq_core.packed import PackedTokens
from qaq_core.packing import HALF, WIDTHS
from qaq_core.pages import KEY, VALUE
from qaq_core.quantizer import Quantizer
from qaq_core.window import Reduction, Statistic
from tests.core.rows import HEAD_DIMS, normal

GROUPS = ("head", "layer", "token")
NAMES = ("progressive", "gaussian", *(f"{codec}-{group}" for codec in ("uniform", "normal") for group in GROUPS))
SINKS = 4
CPU = torch.device("cpu")
KERNELS = ("reference", "generic", "avx2")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an implementation; the C++ ones with their instruction set forced."""
    if request.param == "reference":
        yield request.param
        return
    loaded = library()
    if loaded is None:
        pytest.skip("the C++ library is not built")
    before = loaded.qaq_isa()
    if loaded.qaq_use(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    loaded.qaq_use(before)


def make(kernel: str, codec: Codec) -> Attention:
    return _made(kernel, json.dumps(codec.settings()))


@cache
def _made(kernel: str, settings: str) -> Attention:
    """Once per codec: lookup tables take longer than a test."""
    codec = codecs.make(**json.loads(settings))
    return ReferenceAttention(codec, CPU) if kernel == "reference" else CpuAttention(codec)


def quantizers(layers: int, heads: int, dim: int) -> dict[str, Quantizer]:
    """Every codec, the progressive one with random orders of units, in frames of random matrices or none."""
    pairs = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
    frame = LinearFrame(
        key_matrix=torch.eye(dim) + 0.3 * dim**-0.5 * normal(1, layers, heads, dim, dim),
        value_matrix=torch.eye(dim) + 0.3 * dim**-0.5 * normal(2, layers, heads, dim, dim),
        key_mean=3 * normal(3, layers, heads, dim),
        value_mean=normal(4, layers, heads, dim),
        frequencies=torch.tensor([10_000.0, 500.0], dtype=torch.float64)[:, None] ** -pairs,
        kind=torch.arange(layers) % 2,
    )
    units = torch.arange(dim // 8).repeat_interleave(8)
    orders = [units[normal(5 + side, dim).argsort()].tolist() for side in (KEY, VALUE)]
    made = {
        "progressive": Quantizer(frame, ProgressiveCodec(orders)),
        "gaussian": Quantizer(frame, GaussianCodec()),
    }
    for codec in (UniformCodec, NormalCodec):
        for group in GROUPS:
            made[f"{codec.name}-{group}"] = Quantizer(PlainFrame(), codec(group))
    return made


def decoded(quantizer: Quantizer, side: int, rows: torch.Tensor, meta: torch.Tensor, width: int) -> torch.Tensor:
    """What rows [n, dim] with meta [n, m] become at a width, by the definition of a row."""
    codec, dim = quantizer.codec, rows.shape[1]
    scale, offset = codec.affine(meta)
    scale = scale.expand(-1, 2)[:, (torch.arange(dim) >= 8 * codec.split).long() if codec.split else [0] * dim]
    shift = torch.zeros(len(rows), 1) if offset is None else offset.unsqueeze(-1)
    units = (rows - shift) / scale
    if width == HALF:
        return shift + scale * units.half().float()
    held = codec.order(side, dim)[: width * dim // 16].tolist()
    codes, levels = codec.codes(units).long(), torch.zeros_like(units)
    for octet in range(dim // 8):
        bits, dims = held.count(octet), slice(8 * octet, 8 * octet + 8)
        if bits:
            levels[:, dims] = codec.levels(bits)[codes[:, dims] >> (8 - bits)]
    return shift + scale * levels


class Subject:
    """One layer's tokens of random numbers and widths, and what they decode to in float64."""

    def __init__(
        self,
        quantizer: Quantizer,
        dim: int,
        packed: int,
        heads: int = 2,
        layers: int = 2,
        widths: tuple[int, ...] = WIDTHS,
        sinks: int = SINKS,
        recent: int = 17,
        dtype: torch.dtype = torch.float16,
        size: float = 1.0,
    ) -> None:
        self.heads, self.layers, self.dim, self.sinks = heads, layers, dim, sinks
        self.length = sinks + packed + recent
        self.quantizer, frame = quantizer, quantizer.frame
        exact = normal(1, 2, layers, heads, sinks + recent + 5, dim).to(dtype)
        self.exact = exact[:, :, :, : sinks + recent]  # a view of a larger buffer, as a sequence's is
        self.packed = PackedTokens(quantizer, (layers, heads, dim), sinks, CPU) if packed else None
        whole = torch.zeros(2, layers, heads, self.length, dim, dtype=torch.float64)
        whole[:, :, :, :sinks] = self.exact[:, :, :, :sinks]
        whole[:, :, :, sinks + packed :] = self.exact[:, :, :, sinks:]
        self.whole = whole
        if self.packed is None:
            return
        generator = torch.Generator().manual_seed(packed)
        chosen, rows, metas = [], [], []
        for side in (KEY, VALUE):
            row = quantizer.rows(side, normal(2 + side, layers, heads, packed, dim) * size, sinks)
            meta = quantizer.codec.measure(row, None)
            pick = torch.randint(0, len(widths), (layers, heads, packed), generator=generator)
            width = torch.tensor(widths, dtype=torch.uint8)[pick]
            full = meta.expand(layers, heads, packed, -1)
            seen = torch.zeros_like(row)
            for w in width.unique().tolist():
                seen[width == w] = decoded(quantizer, side, row[width == w], full[width == w], w)
            middle = seen.double()
            if isinstance(frame, LinearFrame):
                mean = (frame.value_mean if side else frame.key_mean).unsqueeze(2).expand_as(seen)
                if side == KEY:
                    angle = frame._angles(sinks + packed)[frame.kind, sinks : sinks + packed].unsqueeze(1)
                    mean = rotate_pairs(mean, angle)
                matrix = frame.value_matrix if side else frame.key_matrix
                middle = middle @ matrix.double().inverse().mT + mean
            whole[side, :, :, sinks : sinks + packed] = middle
            chosen.append(width)
            rows.append(row)
            metas.append(meta)
        for first in range(0, packed, 43):  # as decoding does: some at a time
            part = slice(first, min(packed, first + 43))
            cut = [tuple(t[:, :, part] for t in pair) for pair in (chosen, rows, metas)]
            self.packed.append(cut[0], cut[1], cut[2], (None, None))  # type: ignore[arg-type]

    def tokens(self, layer: int) -> LayerTokens:
        return LayerTokens(layer, self.exact[KEY, layer], self.exact[VALUE, layer], self.sinks, self.packed)

    def check(
        self, one: Attention, group: int, scaling: float = 0.1, window: int | None = None, n: int = 1
    ) -> None:
        """Output and both statistics of every layer, to 1e-3 relative."""
        for layer in range(self.layers):
            query = normal(9 + layer, self.heads * group, n, self.dim)
            keys, values = (self.whole[side, layer].repeat_interleave(group, 0) for side in (KEY, VALUE))
            scores = query.double() @ keys.transpose(1, 2) * scaling
            if window is not None and window < self.length:
                scores[..., : self.length - window] = float("-inf")
            p = scores.softmax(-1)
            grouped = p.view(self.heads, group, n, self.length)
            statistics: dict[Statistic, torch.Tensor] = {
                "max": grouped.amax((1, 2)),
                "mean_square": grouped.square().mean((1, 2)),
            }
            for name, statistic in statistics.items():
                seen = torch.full((self.heads, self.length), torch.nan)
                got = one(query, self.tokens(layer), scaling, window, Reduction(name, seen))
                assert relative(got, p @ values) < 1e-3
                assert relative(seen, statistic) < 1e-3
                assert bool((seen[statistic == 0] < 1e-30).all())
            assert torch.equal(one(query, self.tokens(layer), scaling, window), got)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 48)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ["progressive", "gaussian"])
def test_every_width(kernel: str, name: str, dim: int, width: int) -> None:
    quantizer = quantizers(2, 2, dim)[name]
    Subject(quantizer, dim, 61, widths=(width,)).check(make(kernel, quantizer.codec), group=3)


@pytest.mark.parametrize("name", NAMES)
def test_every_codec_and_group(kernel: str, name: str) -> None:
    quantizer = quantizers(2, 2, 64)[name]
    Subject(quantizer, 64, 131).check(make(kernel, quantizer.codec), group=3)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_group_size(kernel: str, dim: int, group: int) -> None:
    quantizer = quantizers(2, 2, dim)["progressive"]
    Subject(quantizer, dim, 77).check(make(kernel, quantizer.codec), group)


@pytest.mark.parametrize("packed", [1, 7, 9, 33, 47, 48, 49, 96])
def test_every_length(kernel: str, packed: int) -> None:
    quantizer = quantizers(2, 2, 32)["progressive"]
    Subject(quantizer, 32, packed).check(make(kernel, quantizer.codec), group=2)


@pytest.mark.parametrize(("sinks", "recent"), [(4, 1), (4, 40), (1, 16), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_tokens(kernel: str, dtype: torch.dtype, sinks: int, recent: int) -> None:
    quantizer = quantizers(2, 2, 32)["progressive"]
    one = make(kernel, quantizer.codec)
    for packed in (0, 50):
        Subject(quantizer, 32, packed, sinks=sinks, recent=recent, dtype=dtype).check(one, group=2)


@pytest.mark.parametrize("window", [1, 17, 18, 40, 67, 120, 1000])
@pytest.mark.parametrize("name", ["progressive", "uniform-layer"])
def test_sliding_window(kernel: str, name: str, window: int) -> None:
    quantizer = quantizers(2, 2, 32)[name]
    Subject(quantizer, 32, 100).check(make(kernel, quantizer.codec), group=2, window=window)


@pytest.mark.parametrize(("size", "scaling"), [(1e-3, 1.0), (300.0, 0.1), (1.0, 20.0), (1.0, 1e-6)])
def test_extreme_numbers(kernel: str, size: float, scaling: float) -> None:
    quantizer = quantizers(2, 2, 64)["progressive"]
    Subject(quantizer, 64, 100, size=size).check(make(kernel, quantizer.codec), group=3, scaling=scaling)


def test_rows_that_moved(kernel: str) -> None:
    quantizer = quantizers(2, 2, 64)["progressive"]
    subject = Subject(quantizer, 64, 131, widths=(2, 4, 8))
    one, packed = make(kernel, quantizer.codec), subject.packed
    subject.check(one, group=2)
    assert packed is not None
    index = torch.arange(0, packed.tags.numel(), 5)
    narrow = torch.ones(len(index), dtype=torch.uint8)
    packed.change(
        VALUE, index, narrow, torch.empty(0, dtype=torch.uint8), torch.zeros(len(index), dtype=torch.long)
    )
    query = normal(3, 4, 1, 64)
    expected = make("reference", quantizer.codec)(query, subject.tokens(1), 0.1)
    assert relative(one(query, subject.tokens(1), 0.1), expected.double()) < 1e-5


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_each_sequence_by_itself(kernel: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = quantizers(2, 2, 64)["progressive"]
    one, before = make(kernel, quantizer.codec), torch.get_num_threads()
    monkeypatch.setattr(cpu, "_ALONE", 0)
    layers = [Subject(quantizer, 64, packed).tokens(1) for packed in (0, 131, 48, 7, 300)]
    query = normal(3, len(layers), 6, 1, 64)
    seen = [torch.full((2, tokens.length), torch.nan) for tokens in layers]
    torch.set_num_threads(threads)
    try:
        out = one.batch(query, layers, 0.1, 60, [Reduction("mean_square", into) for into in seen])
    finally:
        torch.set_num_threads(before)
    for i, tokens in enumerate(layers):
        alone = torch.full_like(seen[i], torch.nan)
        assert relative(out[i], one(query[i], tokens, 0.1, 60, Reduction("mean_square", alone)).double()) < 1e-5
        assert relative(seen[i], alone.double()) < 1e-5


def test_nan_is_not_hidden(kernel: str) -> None:
    quantizer = quantizers(2, 2, 32)["progressive"]
    subject = Subject(quantizer, 32, 60)
    query = normal(3, 4, 1, 32)
    query[1, 0, 5] = torch.nan
    out = make(kernel, quantizer.codec)(query, subject.tokens(0), 0.1)
    assert out.isnan().all(-1).squeeze(1).tolist() == [False, True, False, False]


def test_what_the_library_does_not_do_goes_to_the_reference(kernel: str) -> None:
    quantizer = quantizers(2, 2, 32)["uniform-head"]
    subject, one = Subject(quantizer, 32, 60), make(kernel, quantizer.codec)
    reference = make("reference", quantizer.codec)
    assert subject.packed is not None
    query, tokens = normal(3, 4, 5, 32), subject.tokens(0)
    assert torch.equal(one(query, tokens, 0.1), reference(query, tokens, 0.1))
    seen: list[torch.Tensor] = []
    one(query[:, :1], tokens, 0.1, None, lambda p, first: seen.append(p))
    assert seen[0].shape == (2, 2, 1, subject.length)
    rows = normal(4, 2, 2, 60, 32)
    for side in subject.packed.sides:
        side.outliers = split_outliers(rows, 0.1, "head")[0]
    assert torch.equal(one(query[:, :1], tokens, 0.1), reference(query[:, :1], tokens, 0.1))
    if isinstance(one, CpuAttention):
        assert one.handed_over["outliers"] >= 1
        assert one.handed_over["a prompt"] >= 2


def test_the_kernel_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = GaussianCodec()
    monkeypatch.setenv("QAQ_KERNEL", "reference")
    assert attention.make(codec, CPU).name == "reference"
    monkeypatch.setenv("QAQ_KERNEL", "quick")
    with pytest.raises(ConfigError, match="quick"):
        attention.make(codec, CPU)
    monkeypatch.delenv("QAQ_KERNEL")
    assert attention.make(codec, torch.device("meta")).name == "reference"
    with pytest.raises(ConfigError, match="meta"):
        attention.make(codec, torch.device("meta"), "cpu")
    built = library() is not None
    assert attention.make(codec, CPU).name.startswith("cpu" if built else "reference")


def test_without_the_library_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    codec = GaussianCodec()
    assert attention.make(codec, CPU).name == "reference"
    with pytest.raises(ConfigError, match="compiler"):
        attention.make(codec, CPU, "cpu")
