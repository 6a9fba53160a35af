"""Quality and speed of each form of weights, against the model's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from transformers import DynamicCache

from qaq_core.models import LoadedModel
from qaq_eval.quality.documents import Document

STEPS = 24
"""Decode steps that are timed."""


@dataclass(frozen=True)
class WeightsResult:
    """One form of weights over all documents, with a full-precision cache.

    Attributes:
        kl: mean KL divergence of the next token's distribution from that of plain weights, in nats.
        nll_delta: mean difference of the text's NLL, in nats per token.
        top1: share of positions at which both have the same most likely token.
        prompt_tokens_per_second: with each document in one forward pass.
        step_ms: median decode step of one sequence with a short context.
    """

    weights: str
    kl: float
    nll_delta: float
    top1: float
    prompt_tokens_per_second: float
    step_ms: float


@torch.inference_mode()
def weights_loss(
    load: Callable[[str], LoadedModel], documents: Sequence[Document], forms: Sequence[str]
) -> Iterator[WeightsResult]:
    """Compares the predictions for the decoded tokens of each document.

    Args:
        load: loads the model with a form of weights.
        forms: forms of weights; plain weights are always measured first.
    """
    plain: list[torch.Tensor] = []
    for weights in dict.fromkeys(("plain", *forms)):
        model = load(weights).model
        found, seconds = [], 0.0
        for document in documents:
            begun = time.perf_counter()
            logits = model(document.ids[None], logits_to_keep=document.decode + 2).logits[0]
            seconds += time.perf_counter() - begun
            found.append(logits[:-1].float().log_softmax(-1))
        plain = plain or found
        tokens = sum(len(document.ids) for document in documents)
        losses = [_loss(*each) for each in zip(plain, found, documents, strict=True)]
        kl, nll, top1 = (fmean(figures) for figures in zip(*losses, strict=True))
        yield WeightsResult(weights, kl, nll, top1, tokens / seconds, _step_ms(model, documents[0].ids))


def _loss(plain: torch.Tensor, found: torch.Tensor, document: Document) -> tuple[float, float, float]:
    """KL divergence, difference of NLL, and agreement of the most likely token."""
    tokens = document.ids[-len(plain) :, None]
    kl = (plain.exp() * (plain - found)).sum(-1).mean()
    nll = (plain - found).gather(1, tokens).mean()
    return kl.item(), nll.item(), (plain.argmax(-1) == found.argmax(-1)).float().mean().item()


def _step_ms(model: torch.nn.Module, ids: torch.Tensor) -> float:
    cache, times = DynamicCache(), []
    for token in ids[:STEPS]:
        begun = time.perf_counter()
        model(token.view(1, 1), past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - begun)
    return median(times[1:]) * 1000
