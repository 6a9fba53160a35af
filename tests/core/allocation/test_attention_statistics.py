"""Windows: predicted attention against plain sums over all probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.allocation.attention_statistics import (
    LOG2_FLOOR,
    AttentionWindow,
    DecayingMeanSquare,
    PromptObserver,
    StepObserver,
    from_log_byte,
    to_log_byte,
)

LAYERS, HEADS, GROUP, TOTAL = 2, 2, 3, 60
CPU = torch.device("cpu")
STEP = 2 ** (-LOG2_FLOOR / 255 / 2)  # a byte is right to this factor


def causal(seed: int) -> torch.Tensor:
    """Probabilities [layers, heads, group, queries, tokens] of a whole prompt."""
    scores = torch.randn(LAYERS, HEADS, GROUP, TOTAL, TOTAL, generator=torch.Generator().manual_seed(seed)) * 2
    return scores.masked_fill(torch.ones(TOTAL, TOTAL).triu(1).bool(), float("-inf")).softmax(-1)


def watched(watch: PromptObserver, probabilities: torch.Tensor, chunks: tuple[int, ...]) -> torch.Tensor:
    first = 0
    for n in chunks:
        for layer in range(LAYERS):
            watch(layer, probabilities[layer, :, :, first : first + n, : first + n].clone(), first)
        first += n
    return watch.state()


@given(exponent=st.floats(LOG2_FLOOR + 0.2, 0))
def test_a_byte_holds_a_number_to_six_percent(exponent: float) -> None:
    value = torch.tensor(2.0**exponent)
    assert float(from_log_byte(to_log_byte(value))) == pytest.approx(float(value), rel=STEP - 1 + 1e-3)


def test_zero_stays_zero_and_one_stays_one() -> None:
    for dither in (None, 7):
        assert from_log_byte(to_log_byte(torch.tensor([0.0, 1.0]), dither)).tolist() == [0, 1]


def test_dithered_rounding_is_right_on_average() -> None:
    torch.manual_seed(0)
    code = to_log_byte(torch.full((20_000,), 2.0**-10.05), dither=3).float()
    exact = (-10.05 - LOG2_FLOOR) / (-LOG2_FLOOR / 255)
    assert float(code.mean()) == pytest.approx(exact, abs=0.02)
    assert set(code.tolist()) == {float(int(exact)), float(int(exact) + 1)}


@pytest.mark.parametrize("chunks", [(60,), (17, 40, 3), (58, 1, 1)])
def test_the_max_window_holds_the_last_prompt_queries(chunks: tuple[int, ...]) -> None:
    probabilities, statistic = causal(0), AttentionWindow(5)
    state = watched(statistic.prompt(LAYERS, HEADS, TOTAL, TOTAL, CPU), probabilities, chunks)
    assert state.shape == (LAYERS, HEADS, TOTAL, 5)
    expected = from_log_byte(to_log_byte(probabilities[:, :, :, -5:].amax((2, 3))))
    assert torch.equal(statistic.importance(state), expected)


def test_the_max_window_forgets_after_n_steps() -> None:
    statistic = AttentionWindow(3)
    state = torch.zeros(1, 1, 4, 3, dtype=torch.uint8)
    history = torch.rand(8, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    for step, reduction in enumerate(history):
        statistic.update(state, reduction, step)
        expected = history[max(0, step - 2) : step + 1].amax(0)
        assert torch.allclose(statistic.importance(state), expected, rtol=STEP - 1 + 1e-3)


@pytest.mark.parametrize("chunks", [(60,), (17, 40, 3)])
@pytest.mark.parametrize("queries", [256, 20])
def test_the_decay_window_after_a_prompt(chunks: tuple[int, ...], queries: int) -> None:
    """Mean p² of the last queries plus a share of the peak among queries far away."""
    statistic, probabilities = DecayingMeanSquare(queries=queries, distance=8, peak_share=0.3), causal(1)
    state = watched(statistic.prompt(LAYERS, HEADS, TOTAL, TOTAL, CPU), probabilities, chunks)
    squares = probabilities.square().mean(2)  # [layers, heads, queries, tokens]
    last = min(queries, TOTAL)
    expected = squares[:, :, -last:].sum(2) / last
    for token in range(TOTAL):
        far = squares[:, :, token + 8 :, token]
        expected[:, :, token] += 0.3 * (far.amax(-1) if far.shape[-1] else 0)
    got = statistic.importance(state)
    assert torch.allclose(got, expected.clamp_max(1), rtol=STEP - 1 + 1e-3, atol=2.0**LOG2_FLOOR)


def test_statistics_of_a_step() -> None:
    probabilities = causal(2)[0, :, :, -1:]
    expected = probabilities[:, :, 0].amax(1), probabilities[:, :, 0].square().mean(1)
    for statistic, reduction in zip((AttentionWindow(), DecayingMeanSquare()), expected, strict=True):
        into = torch.empty_like(reduction)
        StepObserver(statistic.reduction, into)(probabilities, 0)
        assert torch.allclose(into, reduction)


def test_the_decay_window_halves_in_its_half_life() -> None:
    torch.manual_seed(0)
    statistic = DecayingMeanSquare(half_life=64, every=4)
    state = to_log_byte(torch.full((1, 1, 4000, 1), 2.0**-6))
    for step in range(0, 64, 4):
        statistic.update(state, torch.zeros(1, 1, 4000), step)
    mean = float(statistic.importance(state).log2().mean())
    assert mean == pytest.approx(-7, abs=0.05)


def test_the_decay_window_rises_to_what_it_sees_and_leaves_new_tokens_alone() -> None:
    torch.manual_seed(0)
    statistic = DecayingMeanSquare(half_life=8, every=4)
    state = torch.zeros(1, 1, 30, 1, dtype=torch.uint8)
    for step in range(0, 200, 4):
        statistic.update(state, torch.full((1, 1, 20), 0.1), step)
    importance = statistic.importance(state)
    assert torch.allclose(importance[..., :20], torch.tensor(0.1), rtol=0.3)
    assert float(importance[..., 20:].abs().max()) == 0
