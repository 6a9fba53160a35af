"""Long answers: what a full-precision model generates after a prompt, and what quantization costs along it.

The tokens are sampled once in full precision, at temperature 1, and every configuration reads them (`run.evaluate`).
Its keys and values come from its own quantized cache, so errors may accumulate; the loss by position shows whether
they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from qaq_core import make_method
from qaq_core.base.errors import ConfigError
from qaq_eval.quality.documents import Document
from qaq_eval.quality.prompt import FullPrecisionCache
from qaq_eval.quality.record import DocumentResult
from qaq_eval.quality.tails import standard_error, tails

BUCKETS = 8
"""Parts of an answer that have a figure each."""


@dataclass(frozen=True)
class Continuation:
    """What the model generated after the prompt of a document, one token more than is decoded."""

    document: int
    tokens: list[int]


@dataclass(frozen=True)
class PositionResult:
    """One configuration over the same part of all answers, in nats per token; see `EvalResult`.

    Attributes:
        first, last: decoded tokens of the part, counted from 1.
    """

    config: str
    first: int
    last: int
    delta_nll: float
    delta_nll_se: float
    kl_mean: float
    kl_mean_se: float
    kl_median: float
    kl_median_se: float
    kl_p99: float
    kl_p99_se: float
    kl_max: float
    kl_max_se: float


@torch.no_grad()
def generate(
    model: Any,
    fingerprint: str | None,
    documents: Sequence[Document],
    known: dict[int, list[int]],
    progress: Callable[[str, float], None],
    seed: int = 0,
) -> Iterator[Continuation]:
    """Continuations of documents' prompts, as long as the documents' own.

    Args:
        known: continuations by document that need not be generated.
    """
    method = make_method(model, fingerprint, "fp16")
    missing = [document for document in documents if document.index not in known]
    for done, document in enumerate(missing):
        generator = torch.Generator().manual_seed(seed + document.index)
        prompt, last = document.ids[: document.context - 1], document.ids[document.context - 1 : document.context]
        full = FullPrecisionCache(model, method, prompt, [], document.decode + 2)
        tokens: list[int] = []
        while len(tokens) <= document.decode:
            if len(tokens) % 16 == 0:
                share = (done + len(tokens) / document.decode) / len(missing)
                progress(f"answer {done + 1} of {len(missing)}: {len(tokens)} tokens", share)
            probabilities = full.extend(last)[0].exp().cpu()
            last = torch.multinomial(probabilities, 1, generator=generator)
            tokens.append(int(last))
        yield Continuation(document.index, tokens)


def continued(document: Document, tokens: Sequence[int]) -> Document:
    """The document's prompt with another continuation."""
    if len(tokens) != document.decode + 1:
        raise ConfigError(f"document {document.index} needs {document.decode + 1} generated tokens, not {len(tokens)}")
    return Document(
        document.index, torch.cat([document.ids[: document.context], torch.tensor(tokens)]), document.context
    )


def summarize_positions(results: Sequence[DocumentResult], config: str, buckets: int = BUCKETS) -> list[PositionResult]:
    """The loss of a configuration along the answers, in equal parts."""
    own = [result for result in results if result.config == config]
    if not own:
        raise ConfigError(f"there is no measurement of {config}")
    decode = len(own[0].kl)
    edges = [decode * i // buckets for i in range(buckets + 1)]
    parts = []
    for first, last in pairwise(edges):
        if first == last:
            continue
        deltas = [
            torch.tensor(result.nll[first:last], dtype=torch.float64)
            - torch.tensor(result.nll_full[first:last], dtype=torch.float64)
            for result in own
        ]
        parts.append(
            PositionResult(
                config=config,
                first=first + 1,
                last=last,
                delta_nll=float(torch.cat(deltas).mean()),
                delta_nll_se=standard_error(deltas),
                **tails([torch.tensor(result.kl[first:last], dtype=torch.float64) for result in own]),
            )
        )
    return parts
