"""The quantizer: rows, planes, requests, and the bytes that name it."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.quantization.bit_planes import LevelTable, unpack_half
from qaq_core.quantization.quantizer import Quantizer
from qaq_core.quantization.transforms import LinearTransform
from tests.core.rows import HEAD_DIMS, QUANTIZER_NAMES, decoded, normal, page_shape, quantizers, request

CPU = torch.device("cpu")


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), side=st.sampled_from((KEY, VALUE)))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["balanced", "uniform-layer", "normal-head"])
def test_encoded_rows_unpack_to_the_codecs_levels(name: str, width: int, side: int, seed: int, dim: int) -> None:
    quantizer = made(name, dim)
    rows = quantizer.rows(side, normal(seed, 1, 1, 6, dim), start=9)
    meta = quantizer.codec.meta(rows, None)
    rows, meta = rows[0, 0], meta[0, 0]
    packed = quantizer.encode(side, rows, meta, 0, width)
    assert packed.shape == (6, dim * width // 16)
    got = unpacked(quantizer, side, packed, meta, width, dim)
    assert torch.equal(got, decoded(quantizer, side, rows, meta, width))


@cache
def made(name: str, dim: int) -> Quantizer:
    return quantizers(1, 1, dim)[name]


def unpacked(
    quantizer: Quantizer, side: int, packed: torch.Tensor, meta: torch.Tensor, width: int, dim: int
) -> torch.Tensor:
    """Rows [n, dim] as attention reads them."""
    units = torch.empty(len(packed), dim)
    if width == HALF:
        units = unpack_half(packed)
    else:
        levels = [quantizer.codec.levels(bits) for bits in range(1, 9)]
        LevelTable(levels, quantizer.layout(side, dim), CPU).unpack(packed, width, units)
    scale, offset = quantizer.codec.affine(meta)
    return units * quantizer.spread(scale, dim) + (0.0 if offset is None else offset[:, None])


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS), side=st.sampled_from((KEY, VALUE)))
@pytest.mark.parametrize("name", ["balanced", "uniform-layer"])
def test_mixed_widths_are_each_rows_own(name: str, side: int, seed: int, dim: int) -> None:
    quantizer, n = made(name, dim), 12
    rows = quantizer.rows(side, normal(seed, 1, 1, n, dim), start=0)
    meta = quantizer.codec.meta(rows, None).expand(1, 1, n, -1)[0, 0]
    generator = torch.Generator().manual_seed(seed)
    every = torch.tensor(WIDTHS, dtype=torch.uint8)
    pairs = every[torch.randint(0, len(WIDTHS), (2, n), generator=generator)].sort(0).values
    have, want = torch.where(pairs[1] == HALF, 0, pairs[0]), pairs[1]
    planes, offsets = quantizer.encode_each(side, rows[0, 0], meta, have, want)
    ends = [*offsets[1:].tolist(), len(planes)]
    for i, (first, last) in enumerate(zip(offsets.tolist(), ends, strict=True)):
        whole = quantizer.encode(side, rows[0, 0, i : i + 1], meta[i : i + 1], 0, int(want[i]))[0]
        assert torch.equal(planes[first:last], whole[int(have[i]) * dim // 16 :])


@pytest.mark.parametrize("name", QUANTIZER_NAMES)
def test_its_bytes_make_the_same_quantizer(name: str) -> None:
    made = quantizers(2, 3, 64)[name]
    again = Quantizer.from_bytes(made.to_bytes())
    assert (again.id, again.to_bytes(), again.meta_bytes) == (made.id, made.to_bytes(), made.meta_bytes)
    originals = normal(0, 2, 3, 4, 64)
    for side in (KEY, VALUE):
        assert torch.equal(again.rows(side, originals, 5), made.rows(side, originals, 5))
        assert torch.equal(again.layout(side, 64).order, made.layout(side, 64).order)


def test_a_sequences_own_rests_on_its_base() -> None:
    base = quantizers(2, 3, 64)["balanced"]
    originals = 3 + normal(1, 2, 2, 3, 100, 64)
    own = base.centered_on(originals, 4)
    raw = own.to_bytes()
    assert len(raw) < len(base.to_bytes()) / 10
    assert Quantizer.base_of(raw) == base.id
    assert Quantizer.base_of(base.to_bytes()) is None
    again = Quantizer.from_bytes(raw, base)
    assert (again.id, again.to_bytes()) == (own.id, raw)
    assert own.id not in (base.id, base.centered_on(originals + 1, 4).id)
    assert (base.own_bytes, own.own_bytes) == (0, 2 * 2 * 3 * 64 * 4)
    for side in (KEY, VALUE):
        rows = again.rows(side, originals[:, side], 4)
        assert torch.equal(rows, own.rows(side, originals[:, side], 4))
        assert rows.square().mean() < base.rows(side, originals[:, side], 4).square().mean()
    for wrong in (None, own, quantizers(2, 3, 64)["uniform-layer"], quantizers(1, 3, 64)["balanced"]):
        with pytest.raises(ConfigError, match="mean"):
            Quantizer.from_bytes(raw, wrong)


def test_tables_that_share_memory_have_bytes_too() -> None:
    matrix, mean = torch.eye(16).expand(2, 1, -1, -1), torch.zeros(2, 1, 16)
    transform = LinearTransform(matrix, matrix, mean, mean, torch.ones(1, 8), torch.zeros(2))
    again = Quantizer.from_bytes(Quantizer(transform, quantizers(1, 1, 16)["balanced"].codec).to_bytes())
    assert torch.equal(again.transform.tensors()["value_matrix"], matrix)


def test_different_quantizers_have_different_names() -> None:
    every = [q.id for layers in (1, 2) for q in quantizers(layers, 3, 64).values()]
    assert all(len(name) == 16 for name in every)
    assert len(set(every)) == len(QUANTIZER_NAMES) + 1  # only `balanced` holds tables that depend on the layers


def test_an_unknown_frame_is_refused() -> None:
    class Odd:
        name = "odd"

        def tensors(self) -> dict[str, torch.Tensor]:
            return {}

    raw = Quantizer(Odd(), quantizers(1, 1, 16)["balanced"].codec).to_bytes()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="odd"):
        Quantizer.from_bytes(raw)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [KEY, VALUE])
@pytest.mark.parametrize("name", ["balanced", "uniform-token"])
def test_nan_and_infinity_are_refused_naming_layer_and_side(name: str, side: int, bad: float) -> None:
    originals = normal(0, 3, 2, 4, 32)
    originals[1, 1, 2, 7] = bad
    with pytest.raises(QuantizationError, match=f"layer 1: {'value' if side else 'key'}"):
        quantizers(3, 2, 32)[name].rows(side, originals, 0)


def test_both_infinities_in_one_row_are_refused() -> None:
    originals = normal(0, 2, 1, 4, 32)
    originals[1, 0, 0, 0], originals[1, 0, 0, 1] = float("inf"), float("-inf")
    with pytest.raises(QuantizationError, match="layer 1"):
        quantizers(2, 1, 32)["balanced"].rows(VALUE, originals, 0)


@given(seed=st.integers(0, 1 << 30), dim=st.sampled_from(HEAD_DIMS))
@pytest.mark.parametrize("name", QUANTIZER_NAMES)
def test_a_request_is_answered_in_its_order_with_the_missing_planes(name: str, seed: int, dim: int) -> None:
    """Against the planes of the whole block at the wanted width, in any mix of sides and widths."""
    layers, heads, tokens, start, n = 2, 2, 40, 4, 12
    quantizer = quantizers(layers, heads, dim)[name]
    originals = [normal(seed + side, layers, heads, tokens, dim) * 4 for side in (KEY, VALUE)]
    rows = [quantizer.rows(side, originals[side], start) for side in (KEY, VALUE)]
    metas = [quantizer.codec.meta(row, None) for row in rows]
    rng = np.random.default_rng(seed)
    layer, head = rng.integers(0, layers, n), rng.integers(0, heads, n)
    position, side = rng.integers(start, start + tokens, n), rng.integers(0, 2, n)
    lower = rng.integers(0, len(WIDTHS) - 1, n)
    have, want = np.array(WIDTHS)[lower], np.array(WIDTHS)[rng.integers(lower + 1, len(WIDTHS))]
    shape = page_shape(layers, heads, dim)
    halves = [request(shape, metas[s], layer, head, position, np.full(n, s), have, want, start) for s in (KEY, VALUE)]
    asked = request(shape, metas[KEY], layer, head, position, side, have, want, start)
    asked.meta[side == VALUE] = halves[VALUE].meta[side == VALUE]

    picked = torch.stack(
        [originals[s][a, h, p - start] for s, a, h, p in zip(side, layer, head, position, strict=True)]
    )
    got = quantizer.requantize(asked, picked)

    expected = []
    for i in range(n):
        row = rows[side[i]][layer[i], head[i], position[i] - start][None]
        whole = quantizer.encode(int(side[i]), row, torch.from_numpy(asked.meta[i : i + 1]), 0, int(want[i]))
        lacked = whole if want[i] == HALF else whole[:, have[i] * dim // 16 :]
        expected.append(lacked.numpy().reshape(-1))
    assert np.array_equal(got, np.concatenate(expected))
    assert [len(part) for part in expected] == asked.payload_bytes().tolist()


def test_an_empty_request_has_an_empty_answer() -> None:
    quantizer = quantizers(1, 1, 32)["balanced"]
    none = np.zeros(0, dtype=np.int64)
    meta = torch.zeros(1, 1, 0, 1, dtype=torch.uint8)
    asked = request(page_shape(1, 1, 32), meta, none, none, none, none, none, none)
    assert quantizer.requantize(asked, torch.empty(0, 32)).shape == (0,)
