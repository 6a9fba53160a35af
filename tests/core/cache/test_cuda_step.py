"""Decode steps in CUDA C++, emulated: what a reference makes, originals to the bit, and what goes another way."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from qaq_core.attention import CudaAttention
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.cuda_step import CudaStep
from qaq_core.cache.decode_step import LayerwiseStep, begin_decode
from qaq_core.cache.method import Method
from qaq_core.cache.presets import make_method
from qaq_core.cache.sequence import SequenceCache
from qaq_core.storage.staging import Staging
from tests.core.emulated import emulate
from tests.core.tiny_models import first_layers, token_ids

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile them for a CPU")

KIND, PROMPT, STEPS = "llama-64", 50, 6


def made(kernel: str, kind: str = KIND, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Method]:
    model, known = first_layers(kind, 2)
    model = model.to(dtype)
    method = make_method(model, calibration=known, page_tokens=4, kernel="reference", **settings)
    if kernel == "cuda":
        emulate(method)
    return model, method


def fed(model: Any, sequences: list[SequenceCache], ids: torch.Tensor) -> torch.Tensor:
    cache = QAQCache(sequences)
    positions = torch.tensor([[one.length + i for i in range(ids.shape[1])] for one in sequences])
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, qaq_cache=cache
        ).logits
    return logits[:, -1]


def decoded(model: Any, method: Method) -> tuple[list[SequenceCache], torch.Tensor]:
    """Two sequences of other lengths, the first of which has packed tokens; logits of their steps together."""
    sequences = [SequenceCache(method, wait=True) for _ in range(2)]
    for one, tokens in zip(sequences, (PROMPT, 7), strict=True):
        fed(model, [one], token_ids(tokens, seed=tokens))
    steps = [fed(model, sequences, token_ids(2, seed=90 + i).T) for i in range(STEPS)]
    return sequences, torch.stack(steps)


@pytest.mark.parametrize("settings", [{"target_bits": 4.0}, {"target_bits": 2.0, "exceptions": "in-time"}])
def test_it_makes_the_logits_of_the_reference(settings: dict[str, Any]) -> None:
    expected = decoded(*made("reference", **settings))[1]
    model, method = made("cuda", **settings)
    got = decoded(model, method)[1]
    assert isinstance(method.attention, CudaAttention)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    launched = method.attention.launcher.launched  # type: ignore[attr-defined]
    assert launched.count("prepare") == launched.count("merge") == 2 * STEPS
    assert set(method.attention.fallbacks) == {"a prompt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_originals_are_the_models_own_numbers(dtype: torch.dtype) -> None:
    """A window that rounds keeps others."""
    model, method = made("cuda", dtype=dtype, target_bits=4.0)
    sequences, _ = decoded(model, method)
    keys: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *call: keys.append(call[2]))
    fed(model, sequences, token_ids(2, seed=3).T)
    hook.remove()
    shape = method.shape
    for i, one in enumerate(sequences):
        held = one.staging.read(one.length - 1, one.length)
        assert held.dtype == dtype
        assert torch.equal(held[0, 1, :, 0], keys[0][i].view(shape.kv_heads, shape.head_dim))


def test_who_cannot_be_described_goes_layer_by_layer() -> None:
    for kind, expected in (("llama-gqa", LayerwiseStep), (KIND, CudaStep)):
        model, method = made("cuda", kind, target_bits=4.0)
        one = SequenceCache(method)
        fed(model, [one], token_ids(30))
        assert type(begin_decode([one])) is expected
    waiting = SequenceCache(method)
    waiting.expect_prompt(2)
    assert type(begin_decode([waiting])) is LayerwiseStep


def test_sequences_are_described_again_when_rows_or_the_window_changed() -> None:
    model, method = made("cuda", target_bits=4.0)
    one = SequenceCache(method, wait=True)
    fed(model, [one], token_ids(PROMPT))
    attention = method.attention
    assert isinstance(attention, CudaAttention)
    resident = attention.describer.resident(one.packed, one.residual.places()[0])
    address, versions = resident.table.data_ptr(), []
    for i in range(2 * method.pack_tokens):
        versions.append((one.packed.version, bytes(resident.table.numpy())))
        fed(model, [one], token_ids(1, seed=i))
        assert resident is attention.describer.resident(one.packed, one.residual.places()[0])
    assert resident.table.data_ptr() == address
    assert len({version for version, _ in versions}) == len({content for _, content in versions}) > 1


def test_pages_are_complete_when_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = made("cuda", target_bits=4.0)
    one = SequenceCache(method)
    fed(model, [one], token_ids(3))
    taken: list[int] = []
    take = Staging._take
    monkeypatch.setattr(Staging, "_take", lambda self, numbers: (taken.append(1), take(self, numbers))[1])
    fed(model, [one], token_ids(1))
    assert not taken
    assert len(one.staging.names) == 1  # a page has 4 tokens
    assert taken == [1]
    fed(model, [one], token_ids(1))
    fed(model, [one], token_ids(1))
    assert len(taken) == 2
    one.close()
    assert len(taken) == 3
