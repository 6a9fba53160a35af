"""Attention corrected for better rows is attention over them."""

from __future__ import annotations

import pytest
import torch

from qaq_core.allocation.attention_statistics import StepObserver
from qaq_core.attention import BetterRows, LayerTokens, ReferenceAttention, correct
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.storage import packed as packed_tokens
from qaq_core.storage.packed import PackedTokens
from tests.core.conformance import CPU, quantizer, relative
from tests.core.rows import normal, rotated

LAYERS, HEADS, GROUP, DIM, PACKED, SINKS = 2, 2, 3, 32, 90, 4


def packed(widths: torch.Tensor, name: str, own: bool) -> PackedTokens:
    """The same rows, of widths uint8 [2, layers, heads, tokens]."""
    made = quantizer(name, LAYERS, HEADS, DIM)
    made = rotated(made, DIM, 1.0) if own else made
    tokens = PackedTokens(made, (LAYERS, HEADS, DIM), SINKS, CPU)
    originals = [normal(2 + side, LAYERS, HEADS, PACKED, DIM) for side in (KEY, VALUE)]
    rows = [made.rows(side, originals[side], SINKS) for side in (KEY, VALUE)]
    metas = [made.meta(row) for row in rows]
    tokens.append((widths[KEY], widths[VALUE]), tuple(rows), tuple(metas), (None, None))  # type: ignore[arg-type]
    return tokens


@pytest.mark.parametrize("scaling", [0.1, 2.0])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["progressive", "gaussian"])
def test_it_is_attention_over_the_better_rows(
    name: str, own: bool, scaling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_tokens, "BLOCK_TOKENS", 64)
    monkeypatch.setattr("qaq_core.attention.reference.BLOCK_TOKENS", 64)
    generator = torch.Generator().manual_seed(1)
    pick = torch.randint(0, 5, (2, LAYERS, HEADS, PACKED), generator=generator)
    low = torch.tensor(WIDTHS, dtype=torch.uint8)[pick]
    exchanged = torch.rand(LAYERS, HEADS, PACKED, generator=generator) < 0.2
    high = torch.where(exchanged, HALF, low)
    before, after = packed(low, name, own), packed(high, name, own)
    attention, layer = ReferenceAttention(before.quantizer.codec, CPU), 1
    exact = normal(7, 2, HEADS, SINKS + 9, DIM).half()
    query = normal(8, HEADS * GROUP, 1, DIM)
    sums, seen = torch.empty(2, HEADS * GROUP), torch.empty(HEADS, SINKS + PACKED + 9)
    given = [LayerTokens(layer, exact[KEY], exact[VALUE], SINKS, tokens) for tokens in (before, after)]
    out, expected = (
        attention(query, tokens, scaling, None, StepObserver("mean_square", seen, log_sums))
        for tokens, log_sums in zip(given, sums, strict=True)
    )
    assert relative(out, expected) > 0.01

    head, token = torch.nonzero(exchanged[layer], as_tuple=True)
    held, better = (
        torch.stack([attention.rows_at(tokens, side, layer, head, token) for side in (KEY, VALUE)])
        for tokens in (before, after)
    )
    rows = BetterRows(head, token + SINKS, held, better)
    correct(out[:, 0], query[:, 0] * scaling, sums[0], layer, before.quantizer.transform, rows, HEADS)
    left = (sums[1] - sums[0]).exp().clamp(max=1.0)
    errors = (out - expected)[:, 0].norm(dim=-1) / expected[:, 0].norm(dim=-1)
    assert (errors < 1e-5 / left).all(), (errors, left)
    assert (left > 0.4).sum() >= 5  # so that the bound is tight for all heads but one at most


def test_single_rows_are_those_of_all() -> None:
    generator = torch.Generator().manual_seed(2)
    widths = torch.tensor(WIDTHS, dtype=torch.uint8)[
        torch.randint(0, len(WIDTHS), (2, LAYERS, HEADS, PACKED), generator=generator)
    ]
    tokens = packed(widths, "progressive", own=True)
    attention = ReferenceAttention(tokens.quantizer.codec, CPU)
    head, token = torch.arange(HEADS).repeat_interleave(PACKED), torch.arange(PACKED).repeat(HEADS)
    for side in (KEY, VALUE):
        everything = attention.unpack(tokens, side, 1).view(-1, DIM)
        order = torch.randperm(len(head), generator=generator)
        assert torch.equal(attention.rows_at(tokens, side, 1, head[order], token[order]), everything[order])
