"""Parameters do what they say; sampling is repeatable; what is out of range is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from qaq.v1.common_pb2 import SamplingParams
from transformers import GenerationConfig

from services.common.errors import InvalidArgument
from services.worker.sampling import Sampler

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.9, -5.0])


def make(defaults: GenerationConfig | None = None, **params: float) -> Sampler:
    return Sampler(SamplingParams(**params), defaults or GenerationConfig(), torch.device("cpu"))


def draws(sampler: Sampler, count: int = 200) -> Counter[int]:
    """Tokens at `count` places of a text."""
    return Counter(sampler.sample(LOGITS, range(place)) for place in range(count))


def test_greedy_without_a_temperature() -> None:
    assert make().sample(LOGITS, [0]) == 1
    assert make(temperature=0, top_k=3, seed=1).sample(LOGITS, [0]) == 1


def test_models_defaults_hold_for_unset_fields() -> None:
    defaults = GenerationConfig(do_sample=True, temperature=1.0, top_k=1)
    assert draws(make(defaults, seed=1)) == {1: 200}
    assert len(draws(make(defaults, seed=1, top_k=0))) > 1
    assert make(defaults).greedy is False
    assert make(defaults, temperature=0).greedy is True


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.3}, {1}),
        ({"min_p": 0.5}, {1, 3}),
        ({"top_k": 3, "min_p": 0.01}, {1, 2, 3}),
    ],
)
def test_filters(params: dict[str, float], possible: set[int]) -> None:
    assert set(draws(make(temperature=1.0, seed=3, **params))) == possible


def test_temperature_flattens() -> None:
    assert draws(make(temperature=100.0, seed=5))[4] > draws(make(temperature=1.0, seed=5))[4]
    assert draws(make(temperature=0.01, seed=5))[1] > 190


def test_frequencies_follow_the_distribution() -> None:
    count = 4000
    seen = draws(make(temperature=1.0, seed=7), count)
    for token, p in enumerate(LOGITS.softmax(-1).tolist()):
        assert abs(seen[token] / count - p) < 4 * (p * (1 - p) / count) ** 0.5 + 1e-9


def test_seed_repeats() -> None:
    def run(seed: int) -> list[int]:
        sampler = make(temperature=1.0, seed=seed)
        return [sampler.sample(LOGITS, range(place)) for place in range(40)]

    assert run(2**64 - 1) == run(2**64 - 1)
    assert run(1) != run(2)


def test_no_seed_differs_from_run_to_run() -> None:
    runs = set()
    for _ in range(3):
        sampler = make(temperature=5.0)
        runs.add(tuple(sampler.sample(LOGITS, range(place)) for place in range(60)))
    assert len(runs) == 3


def test_a_token_depends_on_seed_choice_and_place_alone() -> None:
    def run(choice: int, places: Iterable[int]) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=5, seed=3), GenerationConfig(), torch.device("cpu"), choice)
        return [sampler.sample(LOGITS, range(place)) for place in places]

    assert run(0, range(20, 40)) == run(0, range(40))[20:]
    assert run(0, range(40)) != run(1, range(40))


def test_frequency_counts_and_presence_does_not() -> None:
    # 1 is ahead of 3 by 0.1; the first two tokens are the prompt's and do not count.
    prompt = [1, 1]

    def best(generated: list[int], **params: float) -> int:
        sampler = Sampler(SamplingParams(**params), GenerationConfig(), torch.device("cpu"), prompt_tokens=2)
        return sampler.sample(LOGITS, [*prompt, *generated])

    assert best([], frequency_penalty=2, presence_penalty=2) == 1
    assert best([1], frequency_penalty=0.06) == 1
    assert best([1, 1], frequency_penalty=0.06) == 3
    assert best([1, 1], presence_penalty=0.06) == 1
    assert best([1], presence_penalty=0.2) == 3
    assert best([3, 1], presence_penalty=-2) == 1
    assert best([3], presence_penalty=-0.2) == 3


def test_bias_is_added() -> None:
    def make(bias: dict[int, float], **params: float) -> Sampler:
        asked = SamplingParams(**params, logit_bias=bias)
        return Sampler(asked, GenerationConfig(), torch.device("cpu"))

    assert make({4: 100}).sample(LOGITS, [0]) == 4
    assert make({1: -100, 3: -100}).sample(LOGITS, [0]) == 2
    assert set(draws(make({1: -100}, temperature=1, seed=1))) == {0, 2, 3}


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    assert make(repetition_penalty=1.2).sample(LOGITS, [4, 1, 1]) == 3
    assert make(repetition_penalty=1.2).sample(LOGITS, [1, 3, 2, 0]) == 1
    assert torch.equal(LOGITS, torch.tensor([0.0, 3.0, 1.0, 2.9, -5.0])), "the logits were written to"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1, "top_p": -0.5},
        {"temperature": 1, "top_p": 1.5, "top_k": -2},
        {"temperature": 1, "top_k": -1},
        {"temperature": 1, "min_p": 2},
        {"top_p": float("nan")},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1},
    ],
)
def test_out_of_range(params: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match="sampling"):
        make(**params)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution(temperature: float) -> None:
    with pytest.raises(RuntimeError):
        make(temperature=temperature).sample(torch.tensor([0.0, float("nan"), 1.0]), [0])
