"""What every implementation of attention is held to: float64 arithmetic over the numbers that rows decode to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from qaq_core.allocation.attention_statistics import Reduction, StepObserver
from qaq_core.attention import Attention, LayerTokens, triton_missing
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.rope import rotate_pairs
from qaq_core.base.widths import WIDTHS
from qaq_core.cache import backends
from qaq_core.kernels import KERNELS, load_library
from qaq_core.quantization.codecs import Codec, GaussianCodec, NormalCodec, ProgressiveCodec, UniformCodec, make_codec
from qaq_core.quantization.outliers import split_outliers
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import IdentityTransform, LinearTransform
from qaq_core.quantization.transforms.rotation import Rotation
from qaq_core.storage import packed as packed_tokens
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.tiled_pool import Weaver
from tests.core.rows import decoded, normal, rotated

CPU = torch.device("cpu")
GRANULARITIES = ("head", "layer", "token")
GROUPED = tuple(f"{codec}-{group}" for codec in ("uniform", "normal") for group in GRANULARITIES)
QUANTIZERS = ("progressive", "gaussian", *GROUPED)
INSTRUCTION_SETS = ("avx512", "avx2", "generic")
"""Of the C++ library, the best first."""
EXACT = 1e-3
"""Most relative error."""


@cache
def kernels() -> tuple[str, ...]:
    """The implementations that this machine can run; C++ once per instruction set."""
    found = ["reference"]
    loaded = load_library()
    if loaded is not None:
        isa = loaded.qaq_isa()
        found += [name for name in INSTRUCTION_SETS if loaded.qaq_use(name.encode()) == 0]
        loaded.qaq_use(isa)
    if triton_missing(CPU) is None:
        found.append("triton")
    return tuple(found)


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """While this lasts, C++ uses the instruction set that an implementation is named after."""
    loaded = load_library()
    if loaded is None:
        yield
        return
    before = loaded.qaq_isa()
    loaded.qaq_use(kernel.encode())
    try:
        yield
    finally:
        loaded.qaq_use(before)


def make(kernel: str, codec: Codec) -> Attention:
    """An implementation; of C++ the one for any instruction set."""
    return _made(kernel if kernel in KERNELS else "cpu", json.dumps(codec.settings()))


@cache
def _made(kernel: str, settings: str) -> Attention:
    """Once per codec: lookup tables take longer than a test."""
    return backends.make_attention(make_codec(**json.loads(settings)), CPU, kernel)


@cache
def quantizer(name: str, layers: int, heads: int, dim: int) -> Quantizer:
    """One of QUANTIZERS: the progressive codec with a random order of units, in a frame of random matrices."""
    if name in GROUPED:
        codec, group = name.split("-")
        return Quantizer(IdentityTransform(), {"uniform": UniformCodec, "normal": NormalCodec}[codec](group))
    pairs = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
    transform = LinearTransform(
        key_matrix=torch.eye(dim) + 0.3 * dim**-0.5 * normal(1, layers, heads, dim, dim),
        value_matrix=torch.eye(dim) + 0.3 * dim**-0.5 * normal(2, layers, heads, dim, dim),
        key_mean=3 * normal(3, layers, heads, dim),
        value_mean=normal(4, layers, heads, dim),
        frequencies=torch.tensor([10_000.0, 500.0], dtype=torch.float64)[:, None] ** -pairs,
        kind=torch.arange(layers) % 2,
    )
    if name == "gaussian":
        return Quantizer(transform, GaussianCodec())
    units = torch.arange(dim // 8).repeat_interleave(8)
    return Quantizer(transform, ProgressiveCodec([units[normal(5 + s, dim).argsort()].tolist() for s in (KEY, VALUE)]))


def subject(name: str, dim: int, packed: int, **given: Any) -> Subject:
    """The same subject for every implementation; not to be changed."""
    return _subject(packed_tokens.BLOCK_TOKENS, name, dim, packed, **given)


@cache
def _subject(block_tokens: int, *args: Any, **given: Any) -> Subject:
    return Subject(*args, **given)


class Subject:
    """The tokens of all layers, of random numbers and widths, and what they decode to in float64.

    Args:
        name: one of QUANTIZERS.
        packed: tokens that are packed, `chunk` at a time, with widths among `widths`.
        size: of their numbers; `spread` more or less from row to row, in powers of two.
        outliers: share of numbers kept beside the codes; grouped codecs only.
        dtype: of exact tokens.
        mean: a sequence's own, about this, and axes of its own; the quantizer's means if not given.
        weaver: what holds rows in tiles, if anything does.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        packed: int,
        heads: int = 2,
        layers: int = 2,
        widths: Sequence[int] = WIDTHS,
        sinks: int = 4,
        recent: int = 17,
        dtype: torch.dtype = torch.float16,
        size: float = 1.0,
        spread: float = 0.0,
        outliers: float = 0.0,
        chunk: int = 43,
        mean: float | None = None,
        weaver: Weaver | None = None,
    ) -> None:
        self.heads, self.layers, self.dim, self.sinks = heads, layers, dim, sinks
        self.length = sinks + packed + recent
        self.quantizer = quantizer(name, layers, heads, dim)
        if mean is not None:
            self.quantizer = rotated(self.quantizer, dim, mean)
        exact = normal(1, 2, layers, heads, sinks + recent + 5, dim).to(dtype)
        self.exact = exact[:, :, :, : sinks + recent]  # a view of a larger buffer, as a sequence's is
        self.packed = PackedTokens(self.quantizer, (layers, heads, dim), sinks, CPU, weaver) if packed else None
        self.whole = torch.zeros(2, layers, heads, self.length, dim, dtype=torch.float64)
        self.whole[:, :, :, :sinks] = self.exact[:, :, :, :sinks]
        self.whole[:, :, :, sinks + packed :] = self.exact[:, :, :, sinks:]
        if self.packed is None:
            return
        sizes = size * torch.exp2(spread * normal(packed, 2, layers, heads, packed, 1))
        parts = [self._quantized(side, sizes[side], widths, outliers) for side in (KEY, VALUE)]
        for first in range(0, packed, chunk):
            part = slice(first, min(packed, first + chunk))
            width, row, meta = (tuple(side[i][:, :, part] for side in parts) for i in range(3))
            kept = tuple(side[3] and side[3].narrow(part.start, part.stop) for side in parts)
            self.packed.append(width, row, meta, kept)  # type: ignore[arg-type]

    def _quantized(self, side: int, sizes: torch.Tensor, widths: Sequence[int], ratio: float) -> tuple[Any, ...]:
        """Random widths, rows, meta bytes and outliers of one side; what they decode to goes to `whole`."""
        layers, heads, packed = sizes.shape[:3]
        row = self.quantizer.rows(side, normal(2 + side, layers, heads, packed, self.dim) * sizes, self.sinks)
        group = getattr(self.quantizer.codec, "group", "head")
        kept, mask = split_outliers(row, ratio, group) if ratio else (None, None)
        meta = self.quantizer.codec.meta(row, mask)
        generator = torch.Generator().manual_seed(packed + side)
        pick = torch.randint(0, len(widths), (layers, heads, packed), generator=generator)
        width = torch.tensor(widths, dtype=torch.uint8)[pick]
        full = meta.expand(layers, heads, packed, -1)
        seen = torch.zeros_like(row)
        for w in width.unique().tolist():
            seen[width == w] = decoded(self.quantizer, side, row[width == w], full[width == w], w)
        if mask is not None:
            seen[mask] = row[mask].half().float()
        self.whole[side, :, :, self.sinks : self.sinks + packed] = self._restored(side, seen.double())
        return width, row, meta, kept

    def _restored(self, side: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows of packed tokens as they were before the frame."""
        transform = self.quantizer.transform
        if not isinstance(transform, LinearTransform):
            return rows
        mean = (transform.value_mean if side else transform.key_mean).unsqueeze(2).expand(rows.shape)
        if side == KEY:
            stop = self.sinks + rows.shape[2]
            angles = [transform.center(layer, stop)[1][self.sinks : stop] for layer in range(self.layers)]
            mean = rotate_pairs(mean, torch.stack(angles).unsqueeze(1))
        matrix = transform.value_matrix if side else transform.key_matrix
        if transform.rotation is not None:
            rows = torch.stack([_turned_back(transform.rotation[side], layer, mine) for layer, mine in enumerate(rows)])
        return rows @ matrix.double().inverse().mT + mean

    def tokens(self, layer: int) -> LayerTokens:
        return LayerTokens(layer, self.exact[KEY, layer], self.exact[VALUE, layer], self.sinks, self.packed)

    def query(self, layer: int, group: int, n: int = 1) -> torch.Tensor:
        return normal(9 + layer, self.heads * group, n, self.dim)

    def probabilities(
        self, query: torch.Tensor, layer: int, scaling: float, sliding_window: int | None
    ) -> torch.Tensor:
        """float64 [query_heads, n, length]."""
        n = query.shape[1]
        keys = self.whole[KEY, layer].repeat_interleave(len(query) // self.heads, 0)
        own, place = torch.arange(self.length - n, self.length)[:, None], torch.arange(self.length)
        hidden = (place > own) | (place <= own - (sliding_window or self.length))
        return (query.double() @ keys.mT * scaling).masked_fill(hidden, float("-inf")).softmax(-1)

    def output(self, probabilities: torch.Tensor, layer: int) -> torch.Tensor:
        return probabilities @ self.whole[VALUE, layer].repeat_interleave(len(probabilities) // self.heads, 0)

    def check(
        self,
        one: Attention,
        group: int,
        scaling: float = 0.1,
        sliding_window: int | None = None,
        layer: int = -1,
        reductions: Sequence[Reduction] = ("max", "mean_square"),
    ) -> None:
        """Output and statistics of a decode step."""
        layer %= self.layers
        query = self.query(layer, group)
        p = self.probabilities(query, layer, scaling, sliding_window)
        expected = self.output(p, layer)
        grouped = p.view(self.heads, group, self.length)
        for name in reductions:
            reduction = grouped.amax(1) if name == "max" else grouped.square().mean(1)
            seen = torch.full((self.heads, self.length), torch.nan)
            got = one(query, self.tokens(layer), scaling, sliding_window, StepObserver(name, seen))
            assert relative(got, expected) < EXACT
            assert relative(seen, reduction) < EXACT
            assert bool((seen[reduction == 0] < 1e-30).all())
        # Asked for the sums of scores, an implementation without them leaves the step to the reference.
        sums = torch.full((len(query),), torch.nan)
        got = one(query, self.tokens(layer), scaling, sliding_window, StepObserver("mean_square", seen, sums))
        most = p[:, 0].max(-1)
        keys = self.whole[KEY, layer].repeat_interleave(group, 0)
        score = (query[:, 0].double() * keys[torch.arange(len(query)), most.indices]).sum(-1) * scaling
        assert relative(got, expected) < EXACT
        assert float((sums.double() - (score - most.values.log())).abs().max()) < EXACT * (1 + float(score.abs().max()))


def _turned_back(rotation: Rotation, layer: int, rows: torch.Tensor) -> torch.Tensor:
    before, after = (
        part[layer].double().repeat_interleave(8, -1).unsqueeze(1) for part in (rotation.before, rotation.after)
    )
    return (rows / after) @ rotation.matrix(layer) / before


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())
