"""Reference attention against a plain softmax over the rows as the codec defines them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qaq_core import packed as packed_module
from qaq_core.attention.reference import LayerTokens, ReferenceAttention
from qaq_core.outliers import split_outliers
from qaq_core.packed import PackedTokens
from qaq_core.packing import HALF, WIDTHS
from qaq_core.pages import KEY, VALUE
from tests.core.rows import QUANTIZER_NAMES, decoded, normal, quantizers

LAYERS, HEADS, GROUP, SINKS, PACKED, RECENT = 2, 2, 3, 4, 45, 9
LENGTH = SINKS + PACKED + RECENT
CPU = torch.device("cpu")


class Subject:
    """Exact tokens, packed tokens of all widths, and the same tokens decoded the slow way."""

    def __init__(self, name: str, dim: int, outliers: bool) -> None:
        self.quantizer = quantizers(LAYERS, HEADS, dim)[name]
        self.packed = PackedTokens(self.quantizer, (LAYERS, HEADS, dim), SINKS, CPU)
        self.whole = normal(0, 2, LAYERS, HEADS, LENGTH, dim)  # what attention should see
        widths, rows, metas, kept = [], [], [], []
        choices = torch.tensor(WIDTHS[1:-1], dtype=torch.uint8)
        for side in (KEY, VALUE):
            middle = self.whole[side, :, :, SINKS : SINKS + PACKED]
            row = self.quantizer.rows(side, middle, SINKS)
            split, mask = split_outliers(row, 0.1, name.split("-")[1]) if outliers else (None, None)
            meta = self.quantizer.codec.measure(row, mask)
            generator = torch.Generator().manual_seed(side)
            width = choices[torch.randint(0, len(choices), (LAYERS, HEADS, PACKED), generator=generator)]
            if side == VALUE and name == "balanced":
                width[:, :, ::5] = 0
            if name == "balanced":
                width[:, :, 3::7] = HALF
            full = meta.expand(LAYERS, HEADS, PACKED, -1)
            seen = torch.zeros_like(row)
            for w in width.unique().tolist():
                seen[width == w] = decoded(self.quantizer, side, row[width == w], full[width == w], w)
            if mask is not None:
                seen[mask] = row[mask].half().float()
            self.whole[side, :, :, SINKS : SINKS + PACKED] = self._restored(side, middle, row, seen)
            widths.append(width)
            rows.append(row)
            metas.append(meta)
            kept.append(split)
        self.packed.append((widths[0], widths[1]), (rows[0], rows[1]), (metas[0], metas[1]), (kept[0], kept[1]))

    def _restored(self, side: int, middle: torch.Tensor, row: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Original plus the error that the frame's rows have, turned back."""
        error, tables = (seen - row).double(), self.quantizer.frame.tensors()
        if tables:
            error = error @ torch.linalg.inv(tables[("key_matrix", "value_matrix")[side]].double()).mT
        return middle + error.float()

    def tokens(self, layer: int) -> LayerTokens:
        exact = torch.cat([self.whole[:, :, :, :SINKS], self.whole[:, :, :, SINKS + PACKED :]], 3)
        return LayerTokens(layer, exact[KEY, layer], exact[VALUE, layer], SINKS, self.packed)

    def expected(self, query: torch.Tensor, layer: int, scaling: float, window: int | None) -> tuple[Any, Any]:
        keys, values = (self.whole[s, layer].repeat_interleave(GROUP, 0) for s in (KEY, VALUE))
        n = query.shape[1]
        own = torch.arange(LENGTH - n, LENGTH)[:, None]
        place = torch.arange(LENGTH)
        hidden = (place > own) | (place <= own - (window or LENGTH))
        p = (query @ keys.transpose(1, 2) * scaling).masked_fill(hidden, float("-inf")).softmax(-1)
        return p, p @ values


@pytest.mark.parametrize("window", [None, 12, 30])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    ("name", "outliers"),
    [(name, False) for name in QUANTIZER_NAMES] + [(name, True) for name in QUANTIZER_NAMES if "-" in name],
)
def test_it_is_softmax_attention(name: str, outliers: bool, n: int, window: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "BLOCK_TOKENS", 16)
        dim = 32
        subject = Subject(name, dim, outliers)
        attention = ReferenceAttention(subject.quantizer.codec, CPU)
        for layer in range(LAYERS):
            query = normal(5 + layer, HEADS * GROUP, n, dim)
            seen: list[torch.Tensor] = []
            got = attention(query, subject.tokens(layer), 0.2, window, lambda p, _, seen=seen: seen.append(p))
            probabilities, expected = subject.expected(query, layer, 0.2, window)
            assert torch.allclose(got, expected, atol=2e-3)
            assert torch.allclose(seen[0].flatten(0, 1), probabilities, atol=2e-3)
            if window is not None:
                assert bool((seen[0][..., : LENGTH - n - window + 1] == 0).all())
        # One block of one layer, levels and units.
        assert attention._scratch.numel() == 2 * HEADS * 16 * dim


def test_long_prompts_are_computed_in_chunks_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from qaq_core.attention import reference

    subject = Subject("balanced", 32, False)
    query = normal(5, HEADS * GROUP, 9, 32)
    attention = ReferenceAttention(subject.quantizer.codec, CPU)
    whole = attention(query, subject.tokens(0), 0.2)
    monkeypatch.setattr(reference, "QUERY_CHUNK", 4)
    starts: list[int] = []
    chunked = attention(query, subject.tokens(0), 0.2, None, lambda p, first: starts.append(first))
    assert starts == [0, 4, 8]
    assert torch.allclose(chunked, whole, atol=1e-5)


def test_without_packed_tokens_it_is_plain_attention() -> None:
    query, keys, values = normal(0, 6, 4, 32), normal(1, 2, 7, 32), normal(2, 2, 7, 32)
    attention = ReferenceAttention(quantizers(1, 1, 32)["balanced"].codec, CPU)
    got = attention(query, LayerTokens(0, keys, values, 4, None), 0.3)
    mask = torch.ones(4, 7).tril(3).bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], mask, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(got, expected[0], atol=1e-5)
