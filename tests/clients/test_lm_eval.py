"""lm_eval's client of completions, against the gateway: what it computes is what the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qaq_core.models import LoadedModel

from .stack import Stack

ENDINGS = [" Paris.", " Berlin.", " a city in Europe"]
CONTEXT = "The capital of France is"


@pytest.fixture
def client(stack: Stack, tokenizer_dir: Path) -> Any:
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    return completions.LocalCompletionsAPI(
        model=stack.model,
        base_url=f"{stack.url}/v1/completions",
        tokenizer=str(tokenizer_dir),
        tokenizer_backend="huggingface",
        max_length=2048,
        num_concurrent=1,
        batch_size=3,
    )


def _instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def test_likelihoods(client: Any, smollm2: LoadedModel) -> None:
    got = client.loglikelihood(_instances("loglikelihood", [(CONTEXT, ending) for ending in ENDINGS]))
    for ending, (logprob, greedy) in zip(ENDINGS, got, strict=True):
        prompt, whole = (smollm2.tokenizer(text)["input_ids"] for text in (CONTEXT, CONTEXT + ending))
        with torch.no_grad():
            scores = smollm2.model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        asked = torch.tensor(whole[len(prompt) :])
        expected = float(scores.gather(1, asked[:, None]).sum())
        assert logprob == pytest.approx(expected, abs=1e-2), ending
        assert greedy == bool((scores.argmax(-1) == asked).all()), ending


def test_generation(client: Any) -> None:
    asked = _instances("generate_until", [(CONTEXT, {"until": ["."], "max_gen_toks": 12, "temperature": 0})])
    (text,) = client.generate_until(asked)
    assert "Paris" in text
    assert "." not in text
