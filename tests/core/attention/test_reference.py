"""Reference attention: several queries at once, as in a prompt; single ones are in test_kernels.py."""

from __future__ import annotations

import pytest
import torch

from qaq_core.attention.reference import LayerTokens, ReferenceAttention
from qaq_core.quantization.codecs import GaussianCodec
from qaq_core.storage import packed as packed_module
from tests.core.conformance import CPU, GROUPED, QUANTIZERS, make, subject
from tests.core.rows import normal

GROUP = 3


@pytest.mark.parametrize("sliding_window", [None, 12, 30])
@pytest.mark.parametrize(("name", "outliers"), [(name, 0.0) for name in QUANTIZERS] + [(name, 0.1) for name in GROUPED])
def test_it_is_causal_softmax_attention(
    name: str, outliers: float, sliding_window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 16)
    mine, n = subject(name, 32, 45, recent=9, outliers=outliers), 5
    attention = make("reference", mine.quantizer.codec)
    for layer in range(mine.layers):
        query = mine.query(layer, GROUP, n)
        seen: list[torch.Tensor] = []
        got = attention(query, mine.tokens(layer), 0.2, sliding_window, lambda p, _, seen=seen: seen.append(p))
        probabilities = mine.probabilities(query, layer, 0.2, sliding_window)
        assert torch.allclose(got.double(), mine.output(probabilities, layer), atol=1e-4)
        assert torch.allclose(seen[0].flatten(0, 1).double(), probabilities, atol=1e-4)
        if sliding_window is not None:
            assert bool((seen[0][..., : mine.length - n - sliding_window + 1] == 0).all())


def test_its_scratch_is_one_block_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "BLOCK_TOKENS", 16)
    mine = subject("progressive", 32, 45, recent=9)
    attention = ReferenceAttention(mine.quantizer.codec, CPU)
    attention(mine.query(0, GROUP, 5), mine.tokens(0), 0.2)
    assert attention._scratch.numel() == 2 * mine.heads * 16 * 32  # levels and rows


def test_long_prompts_are_computed_in_chunks_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from qaq_core.attention import reference

    mine = subject("progressive", 32, 45, recent=9)
    query = mine.query(0, GROUP, 9)
    attention = make("reference", mine.quantizer.codec)
    whole = attention(query, mine.tokens(0), 0.2)
    monkeypatch.setattr(reference, "QUERY_CHUNK", 4)
    starts: list[int] = []
    chunked = attention(query, mine.tokens(0), 0.2, None, lambda p, first: starts.append(first))
    assert starts == [0, 4, 8]
    assert torch.allclose(chunked, whole, atol=1e-5)


def test_without_packed_tokens_it_is_plain_attention() -> None:
    query, keys, values = normal(0, 6, 4, 32), normal(1, 2, 7, 32), normal(2, 2, 7, 32)
    attention = ReferenceAttention(GaussianCodec(), CPU)
    got = attention(query, LayerTokens(0, keys, values, 4, None), 0.3)
    mask = torch.ones(4, 7).tril(3).bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], mask, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(got, expected[0], atol=1e-5)
