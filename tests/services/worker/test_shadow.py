"""A full-precision cache beside a session's compares what it should, whatever becomes of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.worker.shadow import CHUNK, HELD, MOST_KL, TOGETHER, Shadow
from tests.core.tiny_models import VOCABULARY, tiny, token_ids


@pytest.fixture(scope="module", params=["llama-gqa", "gemma3"])
def model(request: pytest.FixtureRequest) -> Any:
    """One has a sliding window."""
    return tiny(request.param)


def text(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = token_ids(count, seed)[0].tolist()
    return tokens


def noise(position: int) -> torch.Tensor:
    """What a quantized cache would say of the token at a position."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(position))


@torch.inference_mode()
def expected(model: Any, tokens: list[int], position: int) -> tuple[float, bool]:
    p = model(input_ids=torch.tensor([tokens[:position]]), use_cache=False).logits[0, -1].float().log_softmax(-1)
    q = noise(position).log_softmax(-1)
    return float((p.exp() * (p - q)).sum()), bool(p.argmax() == q.argmax())


def hold(model: Any, shadow: Shadow, tokens: list[int], positions: range) -> None:
    """What was compared is what each position's whole text gives."""
    assert [each.position for each in shadow.compared] == list(positions)
    for each in shadow.compared:
        kl, same = expected(model, tokens, each.position)
        assert each.kl == pytest.approx(kl, abs=1e-4)
        assert each.same_top == same


@torch.inference_mode()
def test_tokens_that_come_one_by_one_are_compared(model: Any) -> None:
    shadow, tokens = Shadow(model), text(CHUNK + 50)
    prompt = CHUNK + 20
    assert shadow.step(tokens[:prompt], flush=False) == CHUNK
    assert not shadow.keeps_up
    for end in range(prompt, len(tokens)):
        shadow.note(end, noise(end))
        shadow.step(tokens[: end + 1], flush=False)
    assert shadow.count < len(tokens) - prompt  # the last ones wait for more
    while shadow.step(tokens, flush=True):
        pass
    assert shadow.keeps_up
    hold(model, shadow, tokens, range(prompt, len(tokens)))
    assert shadow.count == len(tokens) - prompt
    assert shadow.kl_sum == pytest.approx(sum(each.kl for each in shadow.compared))
    assert shadow.kl_max == max(each.kl for each in shadow.compared)
    assert shadow.length == len(tokens)
    assert shadow.nbytes > 0


@torch.inference_mode()
def test_what_comes_later_than_full_precision_is_compared_too(model: Any) -> None:
    """Full precision is at the end of the text when the quantized cache says what comes next."""
    shadow, tokens = Shadow(model), text(40)
    shadow.step(tokens[:30], flush=True)
    shadow.note(30, noise(30))
    assert shadow.count == 1
    hold(model, shadow, tokens, range(30, 31))


@torch.inference_mode()
def test_a_text_that_goes_on_in_another_way(model: Any) -> None:
    shadow, tokens = Shadow(model), text(60)
    for end in range(40, 60):
        shadow.note(end, noise(end))
    shadow.step(tokens[:50], flush=True)
    assert shadow.count == 11
    # The second turn leaves out the last tokens of the first, of which some had not been computed.
    other = [*tokens[:45], *text(15, seed=1)]
    shadow.cut(45)
    shadow.compared.clear()
    shadow.note(59, noise(59))
    while shadow.step(other, flush=True):
        pass
    hold(model, shadow, other, range(59, 60))
    assert shadow.length == len(other)


@torch.inference_mode()
def test_what_waits_too_long_is_missed(model: Any) -> None:
    shadow, tokens = Shadow(model), text(30 + 2 * HELD)
    for end in range(30, len(tokens)):
        shadow.note(end, noise(end))
    assert shadow.missed == HELD
    while shadow.step(tokens, flush=True):
        pass
    hold(model, shadow, tokens, range(30 + HELD, len(tokens)))


def test_few_tokens_wait_for_more(model: Any) -> None:
    shadow, tokens = Shadow(model), text(30)
    with torch.inference_mode():
        assert shadow.step(tokens[: TOGETHER - 1], flush=False) == 0
        assert shadow.step(tokens[:TOGETHER], flush=False) == TOGETHER
        assert shadow.step(tokens[: TOGETHER + 1], flush=True) == 1


@torch.inference_mode()
def test_another_text_is_not_compared_with_what_was_said_of_the_one_before(model: Any) -> None:
    shadow, tokens = Shadow(model), text(40)
    shadow.step(tokens[:30], flush=True)  # full precision has said what comes at 30
    shadow.cut(10)
    shadow.note(30, noise(30))
    assert shadow.count == 0
    other = [*tokens[:10], *text(30, seed=1)]
    while shadow.step(other, flush=True):
        pass
    hold(model, shadow, other, range(30, 31))


@torch.inference_mode()
@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_a_broken_distribution_is_as_far_as_can_be(model: Any, broken: float) -> None:
    shadow, tokens = Shadow(model), text(20)
    logits = noise(20)
    logits[5:] = broken
    shadow.step(tokens, flush=True)
    shadow.note(20, logits)
    assert [each.kl for each in shadow.compared] == [MOST_KL]


def test_a_fault_of_the_comparison_is_its_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Shadow, position: int) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(Shadow, "_compare", full)
    shadow = Shadow(model)
    shadow.note(3, noise(3))
    assert shadow.failed == "no memory left"
    shadow.note(4, noise(4))  # nothing more is held
    assert list(shadow._quantized) == [3]
