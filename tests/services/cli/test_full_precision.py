"""A served answer beside full precision: the same tokens, the first difference, KL, and what got more bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from qaq_core import Method, QAQCache, SequenceCache, make_method
from qaq_core.models import LoadedModel
from services.cli.demo import long_prompt
from services.cli.demo_result import FullPrecision
from services.cli.full_precision import Answered, Widened, full_precision

TOKENS, PENALTY, NEW = 200, 1.1, 12

pytestmark = pytest.mark.usefixtures("shallow_smollm2")


@pytest.fixture(scope="module")
def prompt(shallow_smollm2: LoadedModel) -> list[int]:
    return shallow_smollm2.tokenizer(long_prompt())["input_ids"][:TOKENS]


def answer(loaded: LoadedModel, prompt: list[int], cache: DynamicCache | QAQCache) -> list[int]:
    """What transformers' own `generate` says."""
    ids = loaded.model.generate(
        torch.tensor([prompt]),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=PENALTY,
    )
    return ids[0, len(prompt) :].tolist()


def compared(loaded: LoadedModel, method: Method, prompt: list[int], served: list[int]) -> FullPrecision:
    return full_precision(loaded, method, Answered(prompt, served, PENALTY, NEW))


def test_half_precision_answers_alike(shallow_smollm2: LoadedModel, prompt: list[int]) -> None:
    served = answer(shallow_smollm2, prompt, DynamicCache())
    method = make_method(shallow_smollm2.model, shallow_smollm2.fingerprint, "fp16")
    found = compared(shallow_smollm2, method, prompt, served)
    assert (found.same_tokens, found.first_difference, found.tokens) == (NEW, None, NEW)
    assert found.text == shallow_smollm2.tokenizer.decode(served)
    assert found.kl_max < 1e-4
    assert found.top1_agreement == 1
    assert (found.requantized_tokens, found.requantized_rows, found.passage) == (0, 0, [])
    # All tokens but the last, which is not computed: 6 layers, K and V, 3 heads, 64 dims, 4 bytes.
    assert found.kv_bytes == (TOKENS + NEW - 1) * 6 * 2 * 3 * 64 * 4


def test_an_answer_that_is_another_is_cut_at_its_first_difference(
    shallow_smollm2: LoadedModel, prompt: list[int]
) -> None:
    own = answer(shallow_smollm2, prompt, DynamicCache())
    served = [*own[:5], (own[5] + 1) % 1000, *own[6:]]
    method = make_method(shallow_smollm2.model, shallow_smollm2.fingerprint, "fp16")
    found = compared(shallow_smollm2, method, prompt, served)
    assert (found.same_tokens, found.first_difference, found.tokens) == (5, 5, NEW)
    assert found.text == shallow_smollm2.tokenizer.decode(own)


def test_a_quantized_cache_is_farther_away_and_repeats_its_own_answer(
    shallow_smollm2: LoadedModel, prompt: list[int]
) -> None:
    method = make_method(shallow_smollm2.model, shallow_smollm2.fingerprint, "balanced", target_bits=1.5)
    served = answer(shallow_smollm2, prompt, QAQCache([], replace(method)))
    found = compared(shallow_smollm2, method, prompt, served)
    assert found.repeated_tokens == len(served)
    assert 0 < found.kl_mean <= found.kl_max
    assert found.kl_mean <= found.kl_p99 <= found.kl_max
    assert 0 <= found.top1_agreement <= 1


def test_vectors_that_get_more_bits_are_counted_at_their_positions(shallow_smollm2: LoadedModel) -> None:
    method = make_method(shallow_smollm2.model, shallow_smollm2.fingerprint, "balanced", target_bits=1.5)
    sequence = SequenceCache(method)
    widened = Widened(sequence)
    widened.look()
    assert widened.rows.sum() == 0
    sequence.packed = method.sequence().packed
    widths = [torch.zeros(6, 3, 4, dtype=torch.uint8) for _ in range(2)]

    class Packed:
        start, stop = 4, 8

        def widths(self, side: int) -> torch.Tensor:
            return widths[side].clone()

    sequence.packed = Packed()  # type: ignore[assignment]
    widened.look()
    widths[0][2, 1, 3] = 4
    widths[1][:2, 0, 1] = 2
    widened.look()
    widths[0][2, 1, 3] = 3  # narrower again
    widened.look()
    assert widened.rows.tolist() == [0, 0, 0, 0, 0, 2, 0, 1]
