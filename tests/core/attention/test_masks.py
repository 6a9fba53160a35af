"""Masks that the cache can keep are told from those that it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from qaq_core import UnsupportedModelError
from qaq_core.attention.masks import MaskCheck, MaskColumns, own_columns, qaq_mask

PADDING = torch.tensor([[True] * 12, [False] * 5 + [True] * 7])


def made(n: int, columns: int, padding: torch.Tensor | None = None, window: int | None = None) -> torch.Tensor:
    """transformers' mask of the last n of some columns, with nothing left out."""
    kind = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    mask = sdpa_mask(
        batch_size=2,
        q_length=n,
        kv_length=columns,
        q_offset=columns - n,
        mask_function=kind,
        attention_mask=padding,
        local_size=window,
        allow_is_causal_skip=False,
    )
    assert mask is not None
    return mask.clone()


@pytest.mark.parametrize("n", [1, 4, 12])
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("additive", [None, torch.finfo(torch.float32).min, float("-inf"), -1e9])
def test_masks_of_transformers_pass(
    n: int, window: int | None, padding: torch.Tensor | None, additive: float | None
) -> None:
    mask = made(n, 12, padding, window)
    if additive is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, additive)
    tokens = None if padding is None else padding
    MaskCheck(12, n, tokens)(mask, window)
    assert torch.equal(own_columns(mask, 2, n), torch.ones(2, n).bool() if padding is None else padding[:, -n:])


def block() -> torch.Tensor:
    mask = made(12, 12)
    mask[:, :, 6:, :6] = False
    return mask


def prefix() -> torch.Tensor:
    mask = made(12, 12)
    mask[:, :, :4, :4] = True
    return mask


def alibi() -> torch.Tensor:
    return torch.zeros(2, 1, 12, 12).masked_fill(~made(12, 12), -1e9) - torch.arange(12.0) / 8


def only_one_row() -> torch.Tensor:
    mask = made(12, 12)
    mask[1, :, 11, 3] = False
    return mask


@pytest.mark.parametrize(
    ("mask", "window", "why"),
    [
        (block(), None, "other tokens"),
        (prefix(), None, "other tokens"),
        (only_one_row(), None, "other tokens"),
        (made(12, 12, window=5), None, "other tokens"),
        (made(12, 12), 5, "other tokens"),
        (made(12, 12, PADDING), None, "other tokens"),
        (alibi(), None, "bias"),
        (made(4, 12), None, "shape"),
        (made(12, 12)[:, 0], None, "shape"),
        (SimpleNamespace(), None, "SimpleNamespace"),
    ],
)
def test_other_masks_are_refused(mask: Any, window: int | None, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        MaskCheck(12, 12, None)(mask, window)


def test_a_mask_is_compared_row_by_row_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaq_core.attention.masks._ROWS", 5)
    MaskCheck(12, 12, PADDING)(made(12, 12, PADDING), None)
    with pytest.raises(UnsupportedModelError, match="other tokens"):
        MaskCheck(12, 12, None)(only_one_row(), None)


def test_another_mask_of_the_same_shape_is_compared_too() -> None:
    check = MaskCheck(12, 12, None)
    check(made(12, 12), None)
    with pytest.raises(UnsupportedModelError, match="other tokens"):
        check(block(), None)


class Listener:
    def __init__(self) -> None:
        self.heard: list[torch.Tensor | None] = []

    def announce(self, attention_mask: torch.Tensor | None) -> None:
        self.heard.append(attention_mask)


def test_a_plain_mask_is_never_made() -> None:
    cache = Listener()
    columns = MaskColumns.of(12, cache)
    asked = {"batch_size": 2, "q_length": 4, "kv_length": columns, "q_offset": 8}
    assert qaq_mask(**asked, attention_mask=PADDING) is None
    assert qaq_mask(**asked, local_size=13) is None
    assert cache.heard[0] is PADDING
    assert cache.heard[1] is None


@pytest.mark.parametrize(
    "special",
    [
        {"local_size": 6, "mask_function": sliding_window_causal_mask_function(6)},
        {"allow_is_causal_skip": False},
        {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True},
    ],
)
def test_any_other_mask_is_made_for_the_cache_to_see(special: dict[str, Any]) -> None:
    mask = qaq_mask(batch_size=2, q_length=12, kv_length=MaskColumns.of(12, Listener()), **special)
    assert mask is not None
    assert mask.shape[2:] == (12, 12)


def test_without_a_qaq_cache_masks_are_those_of_sdpa() -> None:
    assert qaq_mask(batch_size=2, q_length=12, kv_length=12) is None
    mask = qaq_mask(batch_size=2, q_length=12, kv_length=12, attention_mask=PADDING)
    assert mask is not None
    assert torch.equal(mask, made(12, 12, PADDING))
