"""Long answers: they are the model's own, the same for all, and their loss is told by position."""

from __future__ import annotations

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_eval.quality import Config, Document, DocumentResult, evaluate, run
from qaq_eval.quality.long import Continuation, continued, generate, summarize_positions
from tests.core.tiny_models import teacher_forced, tiny, token_ids

KIND, CONTEXT, DECODE = "llama-gqa", 40, 50


def prompts(count: int = 1) -> list[Document]:
    return [Document(i, token_ids(CONTEXT + DECODE + 1, seed=i)[0], CONTEXT) for i in range(count)]


def answers(known: dict[int, list[int]] | None = None, count: int = 1) -> list[Continuation]:
    return list(generate(tiny(KIND), "tiny", prompts(count), known or {}, lambda stage, share: None))


def test_an_answer_is_sampled_from_the_model_and_the_same_again() -> None:
    (answer,) = answers()
    assert len(answer.tokens) == DECODE + 1
    assert answers() == [answer]
    document = continued(prompts()[0], answer.tokens)
    assert document.decode == DECODE
    assert torch.equal(document.ids[:CONTEXT], prompts()[0].ids[:CONTEXT])
    # The tokens of a sample are likelier than those of another text.
    logits = teacher_forced(tiny(KIND), document.ids[None, :-1], CONTEXT)
    own = torch.nn.functional.cross_entropy(logits, document.ids[CONTEXT:])
    other = torch.nn.functional.cross_entropy(logits, prompts()[0].ids[CONTEXT:])
    assert float(own) < float(other)


def test_answers_that_are_known_are_not_generated_again() -> None:
    first, second = answers(count=2)
    assert first.tokens != second.tokens
    assert answers({0: first.tokens}, count=2) == [second]
    with pytest.raises(ConfigError, match="needs 51 generated tokens, not 50"):
        continued(prompts()[0], first.tokens[:-1])


def test_predictions_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    document, configs = prompts()[0], [Config.parse("uniform-2")]
    (whole,) = evaluate(tiny(KIND), "tiny", [document], configs)
    monkeypatch.setattr(run, "CHUNK", 16)
    (parts,) = evaluate(tiny(KIND), "tiny", [document], configs)
    assert parts.nll_full == pytest.approx(whole.nll_full, abs=1e-4)
    assert parts.kl == pytest.approx(whole.kl, abs=1e-4)


def test_a_window_keeps_tokens_exact() -> None:
    document, configs = prompts()[0], [Config.parse("uniform-2")]
    (usual,) = evaluate(tiny(KIND), "tiny", [document], configs)
    (wide,) = evaluate(tiny(KIND), "tiny", [document], configs, window=64)
    assert wide.packed_bytes == 0  # 4 + 2 · 64 tokens are more than there are
    assert usual.packed_bytes > 0
    assert sum(wide.kl) < sum(usual.kl) / 100


def test_positions_by_hand() -> None:
    def part(document: int, kl: list[float]) -> DocumentResult:
        nll = [1 + x for x in kl]
        return DocumentResult(document, "c", [1.0] * len(kl), nll, kl, 1, 100, 400, 50, 300, 2.0, 3.0, 4, 10)

    results = [part(0, [0.0, 0.2, 0.4, 0.6, 1.0]), part(1, [0.2, 0.4, 0.6, 0.8, 1.0])]
    first, second = summarize_positions(results, "c", buckets=2)
    assert (first.first, first.last, second.first, second.last) == (1, 2, 3, 5)
    assert (first.kl_mean, second.kl_mean) == pytest.approx((0.2, 4.4 / 6))
    assert first.kl_mean_se == pytest.approx(0.1)  # of the documents' 0.1 and 0.3
    assert first.delta_nll == pytest.approx(0.2)
    assert second.kl_max == 1.0
    assert len(summarize_positions(results, "c", buckets=8)) == 5
    with pytest.raises(ConfigError, match="no measurement of d"):
        summarize_positions(results, "d")
