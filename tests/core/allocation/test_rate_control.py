"""The price of a bit under a floor that sequences share."""

from __future__ import annotations

from pydoc_data import topics

import torch

from qaq_core.cache.cache import QAQCache
from qaq_core.models import LoadedModel

PROMPT, STEPS = 200, 36


@torch.no_grad()
def test_what_a_floor_takes_is_not_missed_and_comes_back(shallow_smollm2: LoadedModel) -> None:
    """However long it lasts, a sequence does not turn its own price, and afterwards holds what it held."""
    ids = shallow_smollm2.tokenizer(topics.topics["assignment"], return_tensors="pt").input_ids[:, : PROMPT + 2 * STEPS]
    cache = QAQCache.for_model(shallow_smollm2.model, fingerprint=shallow_smollm2.fingerprint)
    shallow_smollm2.model(ids[:, :PROMPT], past_key_values=cache)
    sequence = cache.sequences[0]
    own, before = sequence.rate.own, sequence.packed.mean_bits
    assert own is not None
    sequence.set_lambda_floor(8 * own)
    squeezed = sequence.packed.mean_bits
    assert squeezed < 0.8 * before
    assert sequence.bits_at(8 * own) <= squeezed + 1e-6
    assert squeezed < sequence.bits_at(0.0)
    for at in range(PROMPT, PROMPT + STEPS):
        shallow_smollm2.model(ids[:, at : at + 1], past_key_values=cache)
    assert sequence.rate.own == own
    sequence.set_lambda_floor(0.0)
    assert sequence.rate.recovering
    for at in range(PROMPT + STEPS, PROMPT + 2 * STEPS):
        shallow_smollm2.model(ids[:, at : at + 1], past_key_values=cache)
    assert not sequence.rate.recovering
    assert 0.85 * before < sequence.packed.mean_bits < 1.15 * before
