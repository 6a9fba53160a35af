"""Random states of the pools, and the ends of what they may hold, for the implementations that are quick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qaq_core.base.pages import KEY
from qaq_core.base.widths import WIDTHS
from qaq_core.storage import packed as packed_module
from tests.core.conformance import GROUPED, QUANTIZERS, Subject, forced, kernels, make, subject

QUICK = tuple(kernel for kernel in kernels() if kernel != "triton")


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a `Subject`: few or many classes, so that some are empty; blocks that are full, or begun."""
    name = draw(st.sampled_from(QUANTIZERS))
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    spread = draw(st.floats(0, 3))
    return {
        "name": name,
        "dim": 16 * draw(st.integers(2, 16)),
        "packed": draw(st.one_of(st.sampled_from((0, 1, 48)), st.integers(2, 110))),
        "heads": draw(st.integers(1, 3)),
        "layers": draw(st.integers(1, 2)),
        "widths": draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=5, unique=True)),
        "sinks": draw(st.integers(0, 5)),
        "recent": draw(st.integers(1, 40)),
        "dtype": dtype,
        "size": 2.0 ** draw(st.floats(-20, 7 - 2 * spread)),
        "spread": spread,
        "outliers": draw(st.sampled_from((0.0, 0.02, 0.9))) if name in GROUPED else 0.0,
        "chunk": draw(st.integers(1, 50)),
    }


@settings(max_examples=40)
@given(state=states(), group=st.integers(1, 16), sliding_window=st.one_of(st.none(), st.integers(1, 200)))
def test_random_pools(state: dict[str, Any], group: int, sliding_window: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "BLOCK_TOKENS", 48)
        mine = Subject(**state)
        # Scores of some tens at most: float32 knows larger ones to less than a thousandth.
        largest = mine.whole[KEY].norm(dim=-1).max() * mine.query(0, group).norm(dim=-1).max()
        scaling = 30 / float(largest)
        for kernel in QUICK:
            with forced(kernel):
                mine.check(make(kernel, mine.quantizer.codec), group, scaling, sliding_window, layer=0)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", QUICK)
def test_a_hundred_thousand_tokens(kernel: str) -> None:
    long = subject("uniform-head", 32, 100_000, heads=1, layers=1, widths=(0, 1, 4, 16), chunk=100_000)
    with forced(kernel):
        long.check(make(kernel, long.quantizer.codec), group=2, scaling=0.3)
