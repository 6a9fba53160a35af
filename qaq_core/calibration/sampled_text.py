"""Text that a model samples itself: what it is measured on, so that nothing has to be downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from qaq_core.base.errors import UnsupportedModelError
from qaq_core.calibration.duration import SAMPLING, Progress


@torch.no_grad()
def sample(
    model: Any, sequences: int, tokens: int, generator: torch.Generator, report: Progress
) -> tuple[torch.Tensor, DynamicCache]:
    """[sequences, tokens] sampled at temperature 1 from the beginning-of-sequence token, and their cache."""
    config = model.config.get_text_config(decoder=True)
    first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    first = first[0] if isinstance(first, list) else first
    if first is None:
        raise UnsupportedModelError("the model has neither a BOS nor an EOS token to sample from")
    ids = torch.full((sequences, 1), first, device=generator.device)
    cache = DynamicCache()
    for step in range(tokens - 1):
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].float()
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        if step % 32 == 0:
            report(SAMPLING, step / tokens)
    return ids, cache
