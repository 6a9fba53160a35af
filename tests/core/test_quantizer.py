"""The quantizer: rows, planes, requests, and the bytes that name it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.errors import ConfigError, QuantizationError
from qaq_core.packing import HALF, LevelTable, unpack_half
from qaq_core.pages import KEY, VALUE
from qaq_core.quantizer import Quantizer
from tests.core.rows import HEAD_DIMS, QUANTIZER_NAMES, decoded, normal, page_shape, quantizers, request


@given(
    seed=st.integers(0, 1 << 30),
    dim=st.sampled_from(HEAD_DIMS),
    width=st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8, HALF)),
)
@pytest.mark.parametrize("name", ["balanced", "uniform-layer", "normal-head"])
def test_encoded_rows_unpack_to_the_codecs_levels(name: str, seed: int, dim: int, width: int) -> None:
    quantizer = quantizers(1, 1, dim)[name]
    rows = quantizer.rows(KEY, normal(seed, 1, 1, 6, dim), start=9)
    meta = quantizer.codec.measure(rows, None)
    rows, meta = rows[0, 0], meta[0, 0]
    packed = quantizer.encode(rows, meta, 0, width)
    assert packed.shape == (6, dim // 8, width)
    units = torch.empty(6, dim)
    if width == HALF:
        units = unpack_half(packed)
    else:
        LevelTable(quantizer.codec.levels(width)).unpack(packed, units)
    scale, offset = quantizer.codec.affine(meta)
    got = units * scale[:, None] + (0.0 if offset is None else offset[:, None])
    assert torch.equal(got, decoded(quantizer, rows, meta, width))


@pytest.mark.parametrize("name", QUANTIZER_NAMES)
def test_its_bytes_make_the_same_quantizer(name: str) -> None:
    made = quantizers(2, 3, 64)[name]
    again = Quantizer.from_bytes(made.to_bytes())
    assert (again.id, again.to_bytes(), again.meta_bytes) == (made.id, made.to_bytes(), made.meta_bytes)
    originals = normal(0, 2, 3, 4, 64)
    assert torch.equal(again.rows(KEY, originals, 5), made.rows(KEY, originals, 5))


def test_different_quantizers_have_different_names() -> None:
    every = [q.id for layers in (1, 2) for q in quantizers(layers, 3, 64).values()]
    assert all(len(name) == 16 for name in every)
    assert len(set(every)) == len(QUANTIZER_NAMES) + 1  # only `balanced` holds tables that depend on the layers


def test_an_unknown_frame_is_refused() -> None:
    class Odd:
        name = "odd"

        def tensors(self) -> dict[str, torch.Tensor]:
            return {}

    raw = Quantizer(Odd(), quantizers(1, 1, 8)["balanced"].codec).to_bytes()  # type: ignore[arg-type]
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
    metas = [quantizer.codec.measure(row, None) for row in rows]
    rng = np.random.default_rng(seed)
    layer, head = rng.integers(0, layers, n), rng.integers(0, heads, n)
    position, side = rng.integers(start, start + tokens, n), rng.integers(0, 2, n)
    have = rng.integers(0, 8, n)
    want = np.where(rng.random(n) < 0.2, HALF, rng.integers(have + 1, 9))
    shape = page_shape(layers, heads, dim)
    halves = [
        request(shape, metas[s], layer, head, position, np.full(n, s), have, want, start) for s in (KEY, VALUE)
    ]
    asked = request(shape, metas[KEY], layer, head, position, side, have, want, start)
    asked.meta[side == VALUE] = halves[VALUE].meta[side == VALUE]

    picked = torch.stack(
        [originals[s][a, h, p - start] for s, a, h, p in zip(side, layer, head, position, strict=True)]
    )
    got = quantizer.requantize(asked, picked)

    expected = []
    for i in range(n):
        row = rows[side[i]][layer[i], head[i], position[i] - start][None]
        whole = quantizer.encode(row, torch.from_numpy(asked.meta[i : i + 1]), 0, int(want[i]))
        expected.append((whole if want[i] == HALF else whole[..., have[i] :]).numpy().reshape(-1))
    assert np.array_equal(got, np.concatenate(expected))
    assert [len(part) for part in expected] == asked.payload_bytes().tolist()


def test_an_empty_request_has_an_empty_answer() -> None:
    quantizer = quantizers(1, 1, 32)["balanced"]
    none = np.zeros(0, dtype=np.int64)
    meta = torch.zeros(1, 1, 0, 1, dtype=torch.uint8)
    asked = request(page_shape(1, 1, 32), meta, none, none, none, none, none, none)
    assert quantizer.requantize(asked, torch.empty(0, 32)).shape == (0,)
