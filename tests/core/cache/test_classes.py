"""Classes of transformers: greedy text is DynamicCache's, alone and in a padded batch, or the class is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from qaq_core import QAQCache, UnsupportedModelError
from tests.core.tiny_models import VOCABULARY, token_ids

pytestmark = pytest.mark.slow

IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = IDS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
GPT = IDS | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
BERT = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "head_dim")}
BART = IDS | {"d_model": 64, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
BART |= {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "max_position_embeddings": 128}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": 24}

SERVED: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": LLAMA
    | SLIDING
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "BartForCausalLM": BART,
    "BertLMHeadModel": BERT | {"is_decoder": True},
    "BioGptForCausalLM": BERT,
    "BlenderbotForCausalLM": BART,
    "CTRLLMHeadModel": GPT | {"dff": 96},
    "CohereForCausalLM": LLAMA,
    "GPT2LMHeadModel": GPT,
    "GPTBigCodeForCausalLM": GPT,
    "MBartForCausalLM": BART,
    "MistralForCausalLM": LLAMA | SLIDING,
    "MixtralForCausalLM": LLAMA | EXPERTS,
    "OlmoForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "SmolLM3ForCausalLM": LLAMA,
    "Starcoder2ForCausalLM": LLAMA | SLIDING,
}

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "BartForConditionalGeneration": ("has an encoder", BART),
    "BertForMaskedLM": ("does not generate text", BERT),
    "BertLMHeadModel": ("attends in both directions", BERT | {"is_decoder": False}),
    "BloomForCausalLM": ("does not go through", IDS | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "DeepseekV3ForCausalLM": (
        "latent or shared",
        LLAMA | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32},
    ),
    "DiffLlamaForCausalLM": ("attends twice in a layer", LLAMA),
    "FalconForCausalLM": ("code of its own", BERT),
    "Gemma2ForCausalLM": ("caps its attention logits", LLAMA),
    "GptOssForCausalLM": ("learned attention sinks", LLAMA | EXPERTS),
    "JetMoeForCausalLM": ("repeats its keys", IDS | {"hidden_size": 64, "num_hidden_layers": 2, "kv_channels": 16}),
    "LlamaModel": ("does not generate text", LLAMA),
    "T5ForConditionalGeneration": (
        "has an encoder",
        IDS | {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
}


def made(name: str, settings: dict[str, Any]) -> Any:
    """A tiny model of that class; its weights are large enough for attention to look at something."""
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**settings)).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False
    )
    return out


@pytest.mark.parametrize("name", SERVED)
def test_greedy_text_is_that_of_the_dynamic_cache(name: str) -> None:
    model = made(name, SERVED[name])
    ids = torch.cat([token_ids(40, seed=1), token_ids(40, seed=2)])
    mask = torch.ones_like(ids)
    for padding in (0, 15):
        ids[1, :padding] = mask[1, :padding] = 0
        cache = QAQCache.for_model(model, preset="fp16")
        assert torch.equal(greedy(model, ids, mask, cache), greedy(model, ids, mask, DynamicCache()))
        assert [sequence.length for sequence in cache.sequences] == [59, 59 - padding]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_before_the_first_pass(name: str) -> None:
    why, settings = REFUSED[name]
    model = made(name, settings)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=why):
        QAQCache.for_model(model, preset="fp16")
    assert model.config._attn_implementation == before
