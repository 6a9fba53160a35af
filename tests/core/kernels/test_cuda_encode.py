"""Rows and bytes that the kernels `rotate` and `encode` make, emulated: torch's to the bit, whatever the shape."""

from __future__ import annotations

import shutil

import pytest
import torch

from qaq_core.base.errors import QuantizationError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.kernels.cuda import encode
from qaq_core.kernels.cuda.emulation import Emulation
from qaq_core.kernels.cuda.structures import HEAD_DIMS
from qaq_core.quantization import Quantizer
from qaq_core.quantization.encoder import TorchEncoder, torch_encoder
from tests.core.conformance import CPU, quantizer
from tests.core.rows import normal, rotated

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile them for a CPU")

LAYERS, HEADS = 3, 2


def both(dim: int, name: str = "progressive", rotation: bool = True) -> tuple[Quantizer, Quantizer, Emulation]:
    """A quantizer with torch's encoder, the same with the kernel, and what runs that."""
    launcher = Emulation()
    plain = quantizer(name, LAYERS, HEADS, dim)
    if rotation:
        plain = rotated(plain, dim, 1.0)
    return plain, plain.using(encode.cuda_encoders(launcher, CPU, torch_encoder)), launcher


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [1, 8, 37])
def test_rows_are_torchs_to_the_bit(dim: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "AT_ONCE", 2 * HEADS * tokens * dim)  # two layers, then one
    plain, kernels, launcher = both(dim)
    originals = normal(tokens, LAYERS, 2, HEADS, tokens, dim)
    for side in (KEY, VALUE):
        expected, got = (one.rows(side, originals[:, side], 5) for one in (plain, kernels))
        assert torch.equal(got, expected)
    assert launcher.launched == ["rotate", "rotate"]


def test_without_a_rotation_nothing_is_launched() -> None:
    plain, kernels, launcher = both(64, rotation=False)
    originals = normal(1, LAYERS, HEADS, 9, 64).to(torch.bfloat16)
    assert torch.equal(kernels.rows(KEY, originals, 5), plain.rows(KEY, originals, 5))
    assert not launcher.launched


def test_rows_that_are_no_numbers_name_their_layer() -> None:
    _, kernels, _ = both(64)
    originals = normal(1, LAYERS, HEADS, 9, 64)
    originals[1, 0, 3, 7] = torch.nan
    with pytest.raises(QuantizationError, match="layer 1: value rows hold NaN"):
        kernels.rows(VALUE, originals, 5)


@pytest.mark.parametrize("name", ["progressive", "gaussian"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_bytes_are_torchs(dim: int, name: str) -> None:
    """Of all pairs of widths, half precision and numbers at the ends included."""
    plain, kernels, launcher = both(dim, name, rotation=False)
    pairs = [(have, want) for want in WIDTHS for have in WIDTHS if have <= want]
    have, want = torch.tensor(pairs, dtype=torch.uint8).T
    rows = 2 * normal(1, len(pairs), dim)
    meta = plain.meta(rows.view(1, 1, *rows.shape)).view(len(pairs), -1)
    rows[0], rows[1], rows[2, ::2] = 0.0, 1e30, -1e30
    rows[3:6] *= 1e-20
    for side in (KEY, VALUE):
        (expected, offsets), (got, others) = (one.encode_each(side, rows, meta, have, want) for one in (plain, kernels))
        assert torch.equal(offsets, others)
        assert torch.equal(got, expected)
    assert launcher.launched == ["encode", "encode"]


def test_all_else_is_another_encoders() -> None:
    """Transforms that are not linear, head_dims that kernels do not have, other devices, single rows, bytes."""
    for dim, name in ((64, "uniform-head"), (80, "progressive")):
        plain, kernels, launcher = both(dim, name, rotation=False)
        originals = normal(1, LAYERS, HEADS, 9, dim)
        rows = plain.rows(KEY, originals, 5)
        assert torch.equal(kernels.rows(KEY, originals, 5), rows)
        meta = plain.meta(rows).expand(LAYERS, HEADS, 9, -1).reshape(LAYERS * HEADS * 9, -1)
        assert torch.equal(kernels.encode(KEY, rows, meta, 0, 4), plain.encode(KEY, rows, meta, 0, 4))
        assert not launcher.launched
    plain, kernels, launcher = both(64)
    rows = plain.rows(KEY, normal(1, LAYERS, HEADS, 9, 64), 5)
    assert torch.equal(kernels.meta(rows), plain.meta(rows))
    make = encode.cuda_encoders(launcher, torch.device("cuda"), torch_encoder)
    assert isinstance(make(plain.transform, plain.codec, plain.layout, CPU), TorchEncoder)
