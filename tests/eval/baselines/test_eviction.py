"""Eviction: what is kept is what a plain simulation of each paper's rule keeps, and no more is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qaq_core import Method
from qaq_core.attention import LayerInput
from qaq_core.base.errors import ConfigError
from qaq_core.cache.cache import QAQCache
from qaq_core.cache.presets import make_method
from qaq_eval.baselines.eviction import EvictingCache
from qaq_eval.baselines.scissorhands import PivotCounts
from qaq_eval.quality.documents import Document
from qaq_eval.quality.prompt import full_precision
from tests.core.tiny_models import teacher_forced, tiny, token_ids

PROMPT, DECODE, HEADS, GROUP, DIM = 40, 30, 2, 2, 32


def method(name: str, kind: str = "llama-gqa", **settings: Any) -> Method:
    return make_method(tiny(kind), "tiny", name, **settings)


def sequence(made: Method) -> EvictingCache:
    held = made.sequence()
    assert isinstance(held, EvictingCache)
    return held


class Simulation:
    """One head's cache by the rule as it is written: a dictionary of positions."""

    def __init__(self, baseline: str, share: float) -> None:
        self.baseline, self.share = baseline, share
        self.kept: list[int] = []
        self.worth: dict[int, list[tuple[int, float]]] = {}
        self.rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.length = 0

    def step(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """Queries [group, n, dim] at the next n positions, keys and values [n, dim]; evicts after the last."""
        outputs = []
        for i in range(keys.shape[0]):
            position = self.length
            self.rows[position], self.worth[position] = (keys[i], values[i]), []
            self.kept.append(position)
            self.length += 1
            held_keys = torch.stack([self.rows[at][0] for at in self.kept])
            held_values = torch.stack([self.rows[at][1] for at in self.kept])
            p = (queries[:, i] @ held_keys.T * scaling).softmax(-1)
            outputs.append(p @ held_values)
            for at, seen in zip(self.kept, p.mean(0).tolist(), strict=True):
                self.worth[at].append((position, seen if self.baseline == "h2o" else seen * len(self.kept) > 1))
        budget = max(4, int(self.share * self.length))
        recent = budget // 2 if self.baseline == "h2o" else min(10, budget // 2)
        old = [at for at in self.kept if at < self.length - recent]
        old.sort(key=lambda at: (sum(seen for _, seen in self.worth[at]), at))
        for at in old[: max(0, len(self.kept) - budget)]:
            self.kept.remove(at)
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("baseline", ["h2o", "scissorhands"])
def test_it_keeps_what_the_rule_keeps(baseline: str, share: float) -> None:
    held = sequence(method(f"{baseline}-{share}"))
    layers, scaling = held.method.shape.layers, DIM**-0.5
    heads = [[Simulation(baseline, share) for _ in range(HEADS)] for _ in range(layers)]
    generator = torch.Generator().manual_seed(1)
    # A prompt in two chunks, some steps, a second prompt, more steps.
    steps = [[16, 24], *[[1]] * 12, [9], *[[1]] * 12]
    for prompt in steps:
        if sum(prompt) > 1:
            held.expect_prompt(sum(prompt))
        fed = [[torch.empty(s, 0, DIM) for s in (HEADS * GROUP, HEADS, HEADS)] for _ in range(layers)]
        outputs: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        for n in prompt:
            for layer in range(layers):
                query = torch.randn(HEADS * GROUP, n, DIM, generator=generator) * 3
                # Kept rows are in half precision: numbers that have it already.
                keys, values = torch.randn(2, HEADS, n, DIM, generator=generator).half().float()
                outputs[layer].append(held.attend(LayerInput(layer, query, keys, values, scaling, None)))
                fed[layer] = [torch.cat(pair, 1) for pair in zip(fed[layer], (query, keys, values), strict=True)]
            held.commit()
        for layer in range(layers):
            queries, keys, values = fed[layer]
            for head in range(HEADS):
                expected = heads[layer][head].step(
                    queries[head * GROUP : (head + 1) * GROUP], keys[head], values[head], scaling
                )
                got = torch.cat(outputs[layer], 1)[head * GROUP : (head + 1) * GROUP]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
                assert sorted(held.positions[layer, head].tolist()) == sorted(heads[layer][head].kept)
    assert held.length == sum(map(sum, steps))


@pytest.mark.parametrize("chunk", [1, 150])
def test_counts_go_back_one_history_at_most(chunk: int) -> None:
    generator = torch.Generator().manual_seed(2)
    p = torch.rand(1, 1, 650, 700, generator=generator).tril_(50)  # the first query is the 51st token's
    p /= p.sum(-1, keepdim=True)
    pivotal = p[0, 0] * torch.arange(51, 701)[:, None] > 1
    counts = PivotCounts()
    watch = counts.prompt(1, 1, 700, 650, torch.device("cpu"))
    for first in range(0, 650, chunk):
        watch(0, p[:, :, first : first + chunk], 50 + first)
    # Position 600 begins the running half, 400 the one before.
    assert torch.equal(counts.importance(watch.state())[0, 0], pivotal[350:].sum(0).float())
    state = watch.state()[:, :, :700]
    for position in range(700, 850):
        counts.update(state, torch.ones(1, 1, 700).softmax(-1) * 1.5, position)
    assert bool((state[..., 0] == 50).all())
    assert torch.equal(state[0, 0, :, 1].float(), pivotal[550:].sum(0).float() + 100)


@pytest.mark.parametrize("kind", ["llama-gqa", "mistral-sliding", "gemma3", "opt"])
@pytest.mark.parametrize("baseline", ["h2o-1", "scissorhands-1.0"])
def test_with_everything_kept_it_is_the_models_own_attention(kind: str, baseline: str) -> None:
    ids = token_ids(PROMPT + DECODE)
    expected = teacher_forced(tiny(kind), ids, PROMPT, DynamicCache())
    model = tiny(kind)
    cache = QAQCache([], make_method(model, "tiny", baseline))
    torch.testing.assert_close(teacher_forced(model, ids, PROMPT, cache), expected, atol=3e-3, rtol=3e-3)
    stats = cache.stats()[0]
    assert stats.key_bits == stats.value_bits == {16: stats.tokens * len(cache) * cache.method.shape.kv_heads}


@pytest.mark.parametrize("baseline", ["h2o-0.3", "scissorhands-0.3"])
def test_a_prompt_that_was_computed_elsewhere_is_the_same_prompt(baseline: str) -> None:
    model, ids = tiny("llama-gqa"), token_ids(241)
    made = make_method(model, "tiny", baseline)
    prefill = full_precision(model, made, Document(0, ids[0], 200), [made.statistic])
    prefilled = made.sequence()
    prefilled.load_prefill(prefill.originals, prefill.observer(made.statistic))
    cache = QAQCache([], made)
    with torch.no_grad():
        model(ids[:, :200], past_key_values=cache)
    own = cache.sequences[0]
    assert prefilled.nbytes == own.nbytes
    assert isinstance(prefilled, EvictingCache)
    assert isinstance(own, EvictingCache)
    assert torch.equal(prefilled.positions.sort().values, own.positions.sort().values)


@pytest.mark.parametrize("baseline", ["h2o", "scissorhands"])
@pytest.mark.parametrize("wanted", [2.0, 4.0])
def test_a_target_counts_every_byte(baseline: str, wanted: float) -> None:
    model, ids = tiny("llama-gqa"), token_ids(400)
    cache = QAQCache([], make_method(model, "tiny", baseline, target_compression=wanted))
    teacher_forced(model, ids, 360, cache)
    held = cache.sequences[0]
    stats = held.stats()
    assert stats.compression == pytest.approx(wanted, rel=0.02)
    assert stats.staging_bytes == stats.requantize_bytes == 0
    buffers = [value for value in vars(held).values() if isinstance(value, torch.Tensor)]
    assert held.nbytes == sum(buffer.untyped_storage().nbytes() for buffer in buffers)
    held.close()
    assert held.nbytes == 0


@pytest.mark.parametrize(
    ("name", "settings"), [("h2o", {}), ("h2o-0.2", {"target_compression": 8}), ("h2o", {"target_bits": 2})]
)
def test_either_a_share_or_a_target(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="takes a share of tokens to keep"):
        method(name, **settings)


@pytest.mark.parametrize("name", ["h2o-0", "scissorhands-1.5"])
def test_shares_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="over 0 and at most 1"):
        method(name)
