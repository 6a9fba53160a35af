"""Forms of weights: what they lose, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_core.calibration import measure
from qaq_core.kernels import load_library
from qaq_core.kernels.dense import MOST_ROWS, NativeDense
from qaq_core.models import LoadedModel, load_model
from qaq_core.models.linear import LOSSLESS, WEIGHTS, Float32Linear, Int4Linear, Int8Linear, OneDnnLinear, pack
from qaq_core.models.shape import ModelShape
from tests.core.tiny_models import tiny, token_ids

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
avx512 = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no AVX-512",
)
PACKED = ["float32", *(pytest.param(name, marks=avx512) for name in WEIGHTS if name not in ("auto", *LOSSLESS))]


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("made", "most"),
    [
        (Float32Linear, 1e-5),
        pytest.param(OneDnnLinear, 0.01, marks=avx512),
        pytest.param(Int8Linear, 0.02, marks=avx512),
        pytest.param(Int4Linear, 0.15, marks=avx512),
    ],
)
def test_a_packed_layer_multiplies_as_the_plain_one_does(made, most: float, bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 96, bias=bias)
    packed = made(layer)
    for shape in ((1, 1, 128), (3, 7, 128), (70, 128)):
        x = torch.randn(shape)
        want, got = layer(x), packed(x)
        assert (got.shape, got.dtype) == (want.shape, torch.float32)
        assert (got - want).norm() / want.norm() < most


@avx512
@torch.no_grad()
def test_weights_on_a_grid_of_16_levels_lose_nothing_but_roundings_to_bfloat16() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False)
    levels = torch.randint(0, 16, (32, 2, 32)).float()
    levels[..., 0], levels[..., 1] = 0, 15
    layer.weight.copy_((levels * 0.125 - 0.75).flatten(1))
    x = torch.randn(5, 64).bfloat16().float()
    want, got = layer(x), Int4Linear(layer)(x)
    assert (got - want).abs().max() <= want.abs().max() / 128


@avx512
@torch.no_grad()
def test_a_row_of_equal_weights_stays_as_it_is() -> None:
    layer = torch.nn.Linear(32, 16, bias=False)
    layer.weight.fill_(0.5)
    layer.weight[1] = 0.0
    for made in (Int8Linear, Int4Linear):
        out = made(layer)(torch.ones(1, 32))[0]
        assert out[1] == pytest.approx(0.0, abs=1e-6)
        assert out[0] == pytest.approx(16.0, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama-gqa", "qwen2"])
@pytest.mark.parametrize("weights", PACKED)
def test_a_model_with_packed_weights_says_nearly_the_same(weights: str, kind: str) -> None:
    model, ids = tiny(kind), token_ids(40)
    want = model(ids).logits.log_softmax(-1)
    pack(model, weights)
    got = model(ids).logits.log_softmax(-1)
    kl = (want.exp() * (want - got)).sum(-1).mean()
    assert kl < {"float32": 1e-6, "bfloat16": 1e-3, "int8": 1e-3, "int4": 0.1}[weights]
    assert type(model.get_output_embeddings()) is (Float32Linear if weights == "float32" else OneDnnLinear)


def test_plain_weights_are_left_alone() -> None:
    model = tiny("llama-gqa")
    assert pack(model, "plain") == "plain"
    assert type(model.lm_head) is torch.nn.Linear


def test_auto_takes_what_loses_nothing() -> None:
    model = tiny("llama-gqa")
    weight = model.lm_head.weight
    assert pack(model, "auto") == "float32"
    assert isinstance(model.lm_head, Float32Linear)
    assert model.lm_head.weight.data_ptr() == weight.data_ptr()
    half = tiny("llama-gqa").bfloat16()
    assert pack(half, "auto") == "plain"
    assert type(half.lm_head) is torch.nn.Linear


def test_the_library_multiplies_few_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if load_library() is None:
        pytest.skip("the C++ library is not built")
    rows: list[int] = []
    multiply = NativeDense.multiply
    monkeypatch.setattr(NativeDense, "multiply", lambda self, x, *rest: rows.append(len(x)) or multiply(self, x, *rest))
    packed = Float32Linear(torch.nn.Linear(64, 32))
    with torch.inference_mode():
        packed(torch.randn(1, 1, 64))
        packed(torch.randn(1, MOST_ROWS + 1, 64))
        monkeypatch.setenv("QAQ_KERNEL", "reference")
        packed(torch.randn(1, 1, 64))
    assert rows == [1]


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_go_through_float32_weights(bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 96, bias=bias)
    packed, gradient = Float32Linear(layer), torch.randn(3, 7, 96)
    both = [torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in "xy"]
    layer(both[0]).backward(gradient)
    packed(both[1]).backward(gradient)
    assert (both[0].grad - both[1].grad).norm() / both[0].grad.norm() < 1e-5


def test_a_model_with_float32_weights_is_calibrated_as_with_plain_ones() -> None:
    plain, packed = tiny("llama-gqa"), tiny("llama-gqa")
    pack(packed, "float32")
    want, got = (measure(model, ModelShape.of(model), sequences=1, tokens=32) for model in (plain, packed))
    assert got.source == "gradients"
    for name, table in want.tables.items():
        if name.endswith("costs"):
            torch.testing.assert_close(got.tables[name], table, rtol=1e-2, atol=1e-2 * float(table.max()))


@avx512
def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown weights"):
        pack(tiny("llama-gqa"), "int3")
    with pytest.raises(ConfigError, match="float32"):
        pack(tiny("llama-gqa").bfloat16(), "int8")
    model = tiny("llama-gqa")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 90)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj.*int8"):
        pack(model, "int4")


@avx512
def test_packed_weights_have_no_gradients_and_say_so() -> None:
    layer = Int8Linear(torch.nn.Linear(32, 16))
    with pytest.raises(ConfigError, match="gradients"):
        layer(torch.randn(2, 32, requires_grad=True))


@torch.inference_mode()
@pytest.mark.parametrize("weights", PACKED)
def test_the_demo_model_goes_on_as_with_plain_weights(weights: str, smollm2: LoadedModel, model_path: Path) -> None:
    plain = smollm2
    packed = load_model(str(model_path), weights=weights)
    assert (packed.identity == plain.identity) == (weights in LOSSLESS)
    assert packed.fingerprint == plain.fingerprint
    words = "The three primary colours are red, yellow and blue. Two and two is four. The capital of France is"
    ids = plain.tokenizer(words, return_tensors="pt").input_ids
    want, got = (each.model(ids).logits.log_softmax(-1) for each in (plain, packed))
    assert (want.exp() * (want - got)).sum(-1).mean() < {"float32": 1e-6, "bfloat16": 5e-3}.get(weights, 0.02)
    first, second = (each.model.generate(ids, max_new_tokens=4, do_sample=False) for each in (plain, packed))
    assert first.tolist() == second.tolist()
