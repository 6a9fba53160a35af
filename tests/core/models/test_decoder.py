"""The decoder computes what transformers' modules do, and refuses what it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from qaq_core import QAQCache
from qaq_core.attention.base import LayerInput
from qaq_core.base.errors import UnsupportedModelError
from qaq_core.models import Decoder, LoadedModel
from qaq_core.models.linear import pack
from tests.core.conformance import forced, kernels
from tests.core.tiny_models import _COMMON, calibration, tiny, token_ids

KINDS = ("llama-mha", "llama-gqa", "llama-mqa-80", "qwen2", "qwen3", "mistral", "mistral-sliding", "gemma3")
NATIVE = tuple(kernel for kernel in kernels() if kernel not in ("reference", "triton"))


@pytest.fixture(params=["reference", *NATIVE])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each implementation of the pieces in turn."""
    if request.param == "reference":
        monkeypatch.setenv("QAQ_KERNEL", "reference")
        yield request.param
        return
    with forced(request.param):
        yield request.param


def of(kind: str) -> Any:
    if kind != "qwen3":
        return tiny(kind)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**_COMMON, num_key_value_heads=2, head_dim=32)).eval()
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm, layer.input_layernorm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


class Recorded(QAQCache):
    """A cache that keeps what each layer attends with, and what it gets."""

    def attend(self, given: LayerInput, *others: Any) -> torch.Tensor:
        out = super().attend(given, *others)
        vars(self).setdefault("seen", []).append([part.clone() for part in (*given[1:4], out)])
        return out


@torch.inference_mode()
def prompted(model: Any, ids: torch.Tensor) -> Recorded:
    cache = Recorded.for_model(model, preset="fp16")
    model(ids, past_key_values=cache, use_cache=True)
    cache.seen.clear()
    return cache


@torch.inference_mode()
def stepped(model: Any, ids: torch.Tensor, at: int, cache: QAQCache) -> torch.Tensor:
    positions = torch.full((len(ids), 1), at)
    logits: torch.Tensor = model(ids[:, at : at + 1], position_ids=positions, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_gets_what_transformers_gives_it(kind: str, kernel: str) -> None:
    model = of(kind)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.2, 1.8)
    ids = torch.cat([token_ids(32), token_ids(32, seed=1)])
    theirs, ours = prompted(model, ids[:, :30]), prompted(model, ids[:, :30])
    decoder = Decoder(model)
    assert decoder.name == ("torch" if kernel == "reference" else "native")
    for at in (30, 31):
        want = stepped(model, ids, at, theirs)
        got = decoder(ids[:, at : at + 1], torch.full((2, 1), at), ours)
        assert got.shape == want.shape
        assert torch.allclose(want, got, atol=2e-4, rtol=1e-4)
    assert len(ours.seen) == len(theirs.seen) == 2 * 3
    for mine, his in zip(ours.seen, theirs.seen, strict=True):
        for a, b in zip(mine, his, strict=True):
            assert (a - b).norm() < 1e-4 * a.norm()


def test_several_tokens_at_a_time(kernel: str) -> None:
    model, ids = of("llama-gqa"), token_ids(47)
    theirs, ours = prompted(model, ids[:, :40]), prompted(model, ids[:, :40])
    with torch.inference_mode():
        want = model(ids[:, 40:], past_key_values=theirs, logits_to_keep=5).logits
    got = Decoder(model)(ids[:, 40:], torch.arange(40, 47)[None], ours, keep=5)
    assert torch.allclose(want, got, atol=1e-4)


@pytest.mark.skipif(not NATIVE, reason="the C++ library is not built")
@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3"])
def test_logits_do_not_depend_on_the_batch(kind: str) -> None:
    model = of(kind)
    ids = torch.cat([token_ids(41, seed) for seed in range(7)])
    decoder, at = Decoder(model), torch.full((7, 1), 40)
    together = decoder(ids[:, 40:], at, prompted(model, ids[:, :40]))
    for row, mine in enumerate(ids.split(1)):
        caches = prompted(model, ids[:, :40])
        alone = QAQCache(caches.sequences[row : row + 1])
        assert torch.equal(decoder(mine[:, 40:], at[:1], alone)[0], together[row])


def test_packed_rows_are_attended_to(kernel: str) -> None:
    model, ids = of("llama-gqa"), token_ids(124)
    caches = [QAQCache.for_model(model, calibration=calibration("llama-gqa")) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model(ids[:, :120], past_key_values=cache, use_cache=True)
    decoder = Decoder(model)
    for at in range(120, 124):
        got = decoder(ids[:, at : at + 1], torch.tensor([[at]]), caches[1])
        assert torch.allclose(stepped(model, ids, at, caches[0]), got, atol=1e-3)
    assert len(caches[1].sequences[0].packed) > 0


def test_other_linear_layers_are_called_themselves() -> None:
    model, ids = of("llama-gqa"), token_ids(41)
    pack(model, "float32")
    theirs, ours = prompted(model, ids[:, :40]), prompted(model, ids[:, :40])
    got = Decoder(model)(ids[:, 40:], torch.tensor([[40]]), ours)
    assert torch.allclose(stepped(model, ids, 40, theirs), got, atol=1e-4)


def test_weights_are_not_copied() -> None:
    model, ids = of("llama-gqa"), token_ids(41)
    decoder, cache = Decoder(model), prompted(model, ids[:, :40])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not decoder(ids[:, 40:], torch.tensor([[40]]), cache).any()


class _Other(torch.nn.Linear):
    """A linear layer that does more."""


@pytest.mark.parametrize("kind", ["opt", "bfloat16", "hook", "compiled", "linear", "norm", "activation", "cap"])
def test_what_is_not_known_is_refused(kind: str) -> None:
    model = of("opt" if kind == "opt" else "gemma3" if kind == "cap" else "llama-gqa")
    layer = None if kind == "opt" else model.model.layers[1]
    match kind:
        case "bfloat16":
            model.to(torch.bfloat16)
        case "hook":
            layer.mlp.register_forward_hook(lambda *_: None)
        case "compiled":
            layer.forward = layer.forward
        case "linear":
            layer.mlp.up_proj = _Other(64, 96)
        case "norm":
            layer.input_layernorm = torch.nn.LayerNorm(64)
        case "activation":
            model.config.hidden_act = "relu"
        case "cap":
            model.config.final_logit_softcapping = 30.0
    with pytest.raises(UnsupportedModelError):
        Decoder(model)


@torch.inference_mode()
def test_the_real_model_says_the_same(smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer("The history of the steam engine begins with", return_tensors="pt").input_ids
    decoder, texts = Decoder(smollm2.model), []
    for lean in (False, True):
        cache = QAQCache.for_model(smollm2.model)
        token = smollm2.model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        said = [int(token)]
        for at in range(ids.shape[1], ids.shape[1] + 24):
            positions = torch.tensor([[at]])
            logits = decoder(token, positions, cache) if lean else stepped_once(smollm2.model, token, positions, cache)
            token = logits[:, -1:].argmax(-1)
            said.append(int(token))
        texts.append(said)
    assert texts[0] == texts[1]


def stepped_once(model: Any, token: torch.Tensor, positions: torch.Tensor, cache: QAQCache) -> torch.Tensor:
    logits: torch.Tensor = model(token, position_ids=positions, past_key_values=cache).logits
    return logits
