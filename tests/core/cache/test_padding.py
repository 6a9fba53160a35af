"""Attention masks: what `forward` and `generate` say with padding is what DynamicCache says, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    DynamicCache,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
)

from qaq_core import ConfigError, QAQCache, UnsupportedModelError, make_method
from tests.core.tiny_models import VOCABULARY, tiny, token_ids

N = 40
PADS = (0, 13, 31)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [3, N] with padding on the left, and their mask."""
    ids = torch.cat([token_ids(N, seed=pad) for pad in PADS])
    mask = torch.stack([(torch.arange(N) >= pad).long() for pad in PADS])
    return ids * mask, mask


@torch.no_grad()
def passes(model: Any, cache: Any, parts: list[int], with_mask: bool = True, **arguments: Any) -> torch.Tensor:
    """Logits of the batch, in passes of so many columns."""
    ids, mask = batch()
    logits, begin = [], 0
    for n in parts:
        given = {"attention_mask": mask[:, : begin + n]} if with_mask else {}
        logits.append(model(ids[:, begin : begin + n], past_key_values=cache, **given, **arguments).logits)
        begin += n
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3", "mistral-sliding", "opt"])
@pytest.mark.parametrize("parts", [[N], [36, 1, 1, 1, 1], [34, 3, 3]])
def test_forward_with_padding_and_no_positions(kind: str, parts: list[int]) -> None:
    model = tiny(kind)
    _, mask = batch()
    expected = passes(model, DynamicCache(), parts)[mask.bool()]
    cache = QAQCache.for_model(model, preset="fp16")
    got = passes(model, cache, parts)[mask.bool()]
    assert float((got - expected).abs().max()) < 4e-3
    assert [sequence.length for sequence in cache.sequences] == [N - pad for pad in PADS]


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3", "mistral-sliding"])
def test_a_4d_mask_of_the_same_padding(kind: str) -> None:
    """Bool and additive; what DynamicCache makes of the 2-D one."""
    model = tiny(kind)
    ids, mask = batch()
    seen = torch.ones(N, N).tril().bool() & mask[:, None, None, :].bool()
    expected = passes(model, DynamicCache(), [N])[mask.bool()]
    if kind != "llama-gqa":  # one mask for all layers cannot be right for sliding ones
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="other tokens"):
            model(ids, attention_mask=seen, past_key_values=QAQCache.for_model(model, preset="fp16"))
        return
    for given in (seen, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)):
        cache = QAQCache.for_model(model, preset="fp16")
        with torch.no_grad():
            got = model(ids, attention_mask=given, past_key_values=cache).logits[mask.bool()]
        assert float((got - expected).abs().max()) < 4e-3


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3"])
def test_a_turn_with_padding_of_its_own(kind: str) -> None:
    """A second prompt whose padding is a hole in the mask of all columns."""
    model = tiny(kind)
    ids, mask = batch()
    more = torch.cat([token_ids(8, seed=50 + i) for i in range(3)])
    more_mask = torch.stack([(torch.arange(8) >= pad).long() for pad in (5, 0, 2)])
    whole = torch.cat([mask, more_mask], 1)
    positions = (whole.cumsum(1) - 1).clamp_min(0)

    def run(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=positions[:, :N], past_key_values=cache)
            second = model(more, attention_mask=whole, position_ids=positions[:, N:], past_key_values=cache).logits
            last = torch.cat([whole, torch.ones(3, 1).long()], 1)
            third = model(
                more[:, :1], attention_mask=last, position_ids=positions[:, -1:] + 1, past_key_values=cache
            ).logits
        return torch.cat([second[more_mask.bool()], third[:, 0]])

    if kind == "gemma3":  # its windows count columns, padding included
        with pytest.raises(UnsupportedModelError, match="other tokens"):
            run(QAQCache.for_model(model, preset="fp16"))
        return
    assert float((run(QAQCache.for_model(model, preset="fp16")) - run(DynamicCache())).abs().max()) < 4e-3


def refused(model: Any, cache: Any, sentence: str, **arguments: Any) -> None:
    held = [sequence.length for sequence in cache.sequences]
    with torch.no_grad(), pytest.raises((ConfigError, UnsupportedModelError), match=sentence):
        model(past_key_values=cache, **arguments)
    assert [sequence.length for sequence in cache.sequences] == held


def test_masks_that_cannot_be_served_are_refused() -> None:
    model = tiny("llama-gqa")
    ids, mask = batch()
    block = torch.ones(N, N).tril().bool()
    block[20:, :20] = False
    hole = mask.clone()
    hole[0, 7:9] = 0
    for given, sentence in (
        (hole, "pad on the left"),
        (mask.flip(1), "pad on the left"),
        (torch.zeros_like(mask), "nothing but padding"),
        (mask[:, 1:], "give a mask over all of them"),
        (mask[:2], "give a mask over all of them"),
        (block.expand(3, 1, N, N), "other tokens"),
        (torch.randn(3, 1, N, N), "adds a bias"),
        (torch.ones(3, 1, N, N).bool(), "other tokens"),
    ):
        refused(model, QAQCache.for_model(model, preset="fp16"), sentence, input_ids=ids, attention_mask=given)


def test_later_masks_must_repeat_the_earlier_ones() -> None:
    model = tiny("llama-gqa")
    _, mask = batch()
    cache = QAQCache.for_model(model, preset="fp16")
    passes(model, cache, [N])
    token = torch.full((3, 1), 5)
    more = torch.cat([mask, torch.ones(3, 1).long()], 1)
    hidden = more.clone()
    hidden[0, 0] = 0
    refused(model, cache, "no attention mask", input_ids=token)
    refused(model, cache, "repeat the earlier mask", input_ids=token, attention_mask=torch.ones_like(more))
    refused(model, cache, "repeat the earlier mask", input_ids=token, attention_mask=hidden)
    refused(model, cache, "reset", input_ids=token, attention_mask=torch.ones(3, 1).long())
    with torch.no_grad():
        model(token, attention_mask=more, past_key_values=cache)
    assert [sequence.length for sequence in cache.sequences] == [N + 1 - pad for pad in PADS]


def test_a_used_cache_and_a_new_prompt() -> None:
    model = tiny("llama-gqa")
    cache = QAQCache.for_model(model, preset="fp16")
    model.generate(token_ids(30), past_key_values=cache, max_new_tokens=2, do_sample=False)
    held = cache.get_seq_length()
    for prompt in (9, 50):
        ids = token_ids(prompt)
        positions = torch.arange(prompt)[None]
        refused(model, cache, f"holds {held} tokens already.*reset", input_ids=ids, position_ids=positions)
        refused(model, cache, "reset", input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(ConfigError, match=f"holds {held} tokens already.*reset"):
        model.generate(token_ids(9, seed=1), past_key_values=cache, max_new_tokens=2, do_sample=False)


def test_positions_that_jump_are_refused() -> None:
    model = tiny("llama-gqa")
    for row in ([0, 1, 2, 9], [3, 4, 5, 6], [0, 1, 0, 1]):
        cache = QAQCache.for_model(model, preset="fp16")
        refused(model, cache, "positions", input_ids=token_ids(4), position_ids=torch.tensor([row]))


def small(**names: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **names}


WITHOUT_POSITIONS: dict[str, Any] = {
    "gpt_bigcode": lambda: GPTBigCodeForCausalLM(
        GPTBigCodeConfig(**small(n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2))
    ),
    "ctrl": lambda: CTRLLMHeadModel(
        CTRLConfig(**small(n_embd=64, n_layer=2, n_head=4, n_positions=128, dff=96, initializer_range=0.2))
    ),
    "persimmon": lambda: PersimmonForCausalLM(
        PersimmonConfig(
            **small(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            initializer_range=0.2,
        )
    ),
    "bart": lambda: BartForCausalLM(
        BartConfig(
            **small(d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96),
            max_position_embeddings=128,
            init_std=0.2,
        )
    ),
}
"""Classes whose attention is not told positions: only the mask says what is padding."""


@pytest.mark.parametrize("kind", WITHOUT_POSITIONS)
def test_generate_with_padding_where_attention_knows_no_positions(kind: str) -> None:
    torch.manual_seed(0)
    model = WITHOUT_POSITIONS[kind]().eval()
    ids, mask = batch()

    def run(cache: Any) -> torch.Tensor:
        out: torch.Tensor = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, min_new_tokens=12,
            do_sample=False,
        )  # fmt: skip
        return out

    cache = QAQCache.for_model(model, preset="fp16")
    assert torch.equal(run(cache), run(DynamicCache()))
    assert [sequence.length for sequence in cache.sequences] == [N + 11 - pad for pad in PADS]


def test_a_view_of_uneven_sequences_takes_masks_of_a_sliding_model() -> None:
    """transformers makes them for the longest; each sequence has its own window."""
    model = tiny("mistral-sliding")
    method = make_method(model, preset="fp16")
    prompts = [token_ids(n, seed=n) for n in (60, 35)]
    sequences = [method.sequence() for _ in prompts]
    tokens = torch.tensor([[5], [7]])
    with torch.no_grad():
        for prompt, sequence in zip(prompts, sequences, strict=True):
            model(prompt, past_key_values=QAQCache([sequence]))
        together = model(tokens, past_key_values=QAQCache(sequences), position_ids=torch.tensor([[60], [35]])).logits[
            :, -1
        ]
        alone = [model(torch.cat([p, t[None]], 1)).logits[0, -1] for p, t in zip(prompts, tokens, strict=True)]
    assert float((together - torch.stack(alone)).abs().max()) < 3e-3
