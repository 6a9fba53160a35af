"""Prefill in full precision: what statistics observe in it does not depend on the kernel or on what else observes."""

from __future__ import annotations

import pytest
import torch

from qaq_core.allocation import AttentionStatistic, AttentionWindow, DecayingMeanSquare, NoStatistic
from qaq_core.attention import CpuAttention
from qaq_core.cache.presets import make_method
from qaq_core.kernels import load_library
from qaq_eval.baselines.h2o import AccumulatedAttention, sums
from qaq_eval.quality import Document
from qaq_eval.quality import prompt as prompts
from qaq_eval.quality.prompt import Prefill, full_precision
from tests.core.tiny_models import tiny, token_ids

KIND, CONTEXT = "llama-gqa", 90
STATISTICS: tuple[AttentionStatistic, ...] = (
    AttentionWindow(5),
    AttentionWindow(40),
    DecayingMeanSquare(queries=30, distance=8),
    DecayingMeanSquare(),
    AccumulatedAttention(),
    NoStatistic(),
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "CHUNK", 37)


def prefill(kernel: str, *statistics: AttentionStatistic) -> tuple[Prefill, dict[str, int]]:
    """A prompt in chunks, and how many calls of its attention the reference computed."""
    model = tiny(KIND)
    method = make_method(model, "tiny", "fp16", kernel=kernel)
    with torch.no_grad():
        made = full_precision(model, method, Document(0, token_ids(CONTEXT + 9)[0], CONTEXT), statistics)
    fallbacks = method.attention.fallbacks if isinstance(method.attention, CpuAttention) else {}
    return made, dict(fallbacks)


@pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")
def test_each_statistic_observes_the_same_alone_beside_others_and_with_any_kernel() -> None:
    reference, beside = prefill("reference", *STATISTICS)[0], prefill("cpu", *STATISTICS)[0]
    assert torch.allclose(beside.originals, reference.originals, atol=1e-4)
    assert torch.allclose(beside.log_probabilities, reference.log_probabilities, atol=1e-3)
    for statistic in STATISTICS:
        alone = prefill("cpu", statistic)[0]
        states = [made.observer(statistic).state() for made in (reference, beside, alone)]
        for state in states[1:]:
            if isinstance(statistic, AccumulatedAttention):
                assert torch.allclose(sums(state), sums(states[0]), rtol=1e-3, atol=1e-5)
            elif state.numel():
                far = (state.int() - states[0].int()).abs()
                assert int(far.max()) <= 1
                assert float((far > 0).float().mean()) < 0.01


@pytest.mark.skipif(load_library() is None, reason="the C++ library is not built")
@pytest.mark.parametrize(
    ("statistic", "chunks"), [(DecayingMeanSquare(), 0), (NoStatistic(), 0), (AttentionWindow(5), 1)]
)
def test_the_reference_computes_only_what_a_statistic_of_its_own_reads(
    statistic: AttentionStatistic, chunks: int
) -> None:
    _, fallbacks = prefill("cpu", statistic)
    layers = tiny(KIND).config.num_hidden_layers
    assert fallbacks == ({"a prompt": chunks * layers} if chunks else {})
