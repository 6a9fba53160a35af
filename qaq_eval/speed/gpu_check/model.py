"""Models with random weights on the device, and sequences as if they had read a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qaq_core.allocation import PromptMeans
from qaq_core.cache import SequenceCache, make_method
from qaq_core.calibration import Calibration
from qaq_eval.speed.gpu_check.bench import Machine


@dataclass(frozen=True)
class Shape:
    """Of a model."""

    name: str
    layers: int
    heads: tuple[int, int, int]
    hidden: int
    gate: int
    vocabulary: int


SMALL, LARGE = (
    Shape("135M", 30, (9, 3, 64), 576, 1536, 49152),
    Shape("8B", 32, (32, 8, 128), 4096, 14336, 128256),
)
TINY = Shape("tiny", 2, (3, 1, 64), 96, 128, 97)


def shapes(machine: Machine) -> tuple[Shape, ...]:
    """Of the models that are measured."""
    return (TINY,) if machine.emulated else (SMALL, LARGE)


class RandomModel:
    """A Llama with random weights and a calibration that was never measured.

    Args:
        thin: with hardly any weights, for what depends on its layers and heads alone.
    """

    def __init__(self, machine: Machine, shape: Shape, thin: bool = False) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        query_heads, kv_heads, dim = shape.heads
        sizes = (query_heads * 8, 64, 97) if thin else (shape.hidden, shape.gate, shape.vocabulary)
        config = LlamaConfig(
            vocab_size=sizes[2],
            hidden_size=sizes[0],
            intermediate_size=sizes[1],
            num_hidden_layers=shape.layers,
            num_attention_heads=query_heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            max_position_embeddings=1 << 17,
        )
        with torch.device("meta"):
            module: Any = LlamaForCausalLM(config).eval().to(torch.bfloat16)
        module.to_empty(device=machine.device)
        module.model.rotary_emb = type(module.model.rotary_emb)(config).to(machine.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for name, part in module.named_parameters():
                part.fill_(1.0) if name.endswith("norm.weight") else part.normal_(0.0, 0.02)
        self.module, self.shape = module, shape
        self.method = make_method(module, calibration=_calibration(shape), target_bits=2.5, kernel="cuda")


def _calibration(shape: Shape) -> Calibration:
    _, heads, dim = shape.heads
    dims = (shape.layers, heads)
    eye = torch.eye(dim).half().expand(*dims, dim, dim).clone()
    means, octets = torch.full((*dims, dim), 0.5), torch.full((*dims, dim // 8), 0.5)
    return Calibration(eye, eye.clone(), means, means.clone(), octets, octets.clone(), torch.ones(dims))


def with_prompt(model: RandomModel, tokens: int) -> SequenceCache:
    """A sequence as if its prompt had just been computed; random keys and values, all of them alike important."""
    method, shape = model.method, model.method.shape
    sequence = SequenceCache(method)
    dims = (shape.layers, 2, shape.kv_heads, tokens, shape.head_dim)
    originals = torch.randn(dims, dtype=method.dtype, device=method.device)
    observer = method.statistic.prompt(shape.layers, shape.kv_heads, tokens, tokens, method.device)
    assert isinstance(observer, PromptMeans)
    observer.sums.fill_(1.0 / tokens)
    sequence.load_prefill(originals, observer)
    return sequence
