"""Calibration: what the method has to know of a model, measured once on text the model samples itself.

key_mean, value_mean    mean of a head's keys before RoPE, and of its values
key_, value_sensitivity trace(E[g gᵀ])/head_dim, g the gradient of the loss on model-sampled labels
                        with respect to a vector: how much an error in it costs
query_norm              upper 10% quantile of ‖q‖² of a KV head's queries (the paper's key formula)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qaq_core.errors import UnsupportedModelError
from qaq_core.shape import ModelShape

SEQUENCES, TOKENS = 6, 1024
Progress = Callable[[str, float], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Means [layers, kv_heads, head_dim]; sensitivities and query norm [layers, kv_heads]; all float32."""

    key_mean: torch.Tensor
    value_mean: torch.Tensor
    key_sensitivity: torch.Tensor
    value_sensitivity: torch.Tensor
    query_norm: torch.Tensor

    def to(self, device: torch.device) -> Calibration:
        return Calibration(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def save(self, path: Path) -> None:
        """Writes safetensors, all at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({f.name: getattr(self, f.name).cpu().contiguous() for f in fields(self)}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        return cls(**load_file(path))


def calibrate(
    model: Any, shape: ModelShape, fingerprint: str | None = None, progress: Progress | None = None
) -> Calibration:
    """The model's calibration: shipped, cached from before, or measured now and cached.

    Cached under $QAQ_CACHE_DIR (default ~/.cache/qaq), by the fingerprint of the weights.
    """
    name = f"{fingerprint or weights_fingerprint(model)}.safetensors"
    shipped = resources.files("qaq_core") / "tables" / name
    with resources.as_file(shipped) as path:
        if path.is_file():
            return Calibration.load(path)
    cached = cache_dir() / "calibration" / name
    if cached.is_file():
        return Calibration.load(cached)
    log.info("calibrating %s once, on text it samples itself", type(model).__name__)
    calibration = measure(model, shape, progress=progress)
    calibration.save(cached)
    return calibration


def cache_dir() -> Path:
    return Path(os.environ.get("QAQ_CACHE_DIR", Path.home() / ".cache" / "qaq"))


def weights_fingerprint(model: Any) -> str:
    """BLAKE3 of configuration and weights, for models that came from no file."""
    digest = blake3(model.config.to_json_string(use_diff=True).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(16)


def measure(
    model: Any,
    shape: ModelShape,
    sequences: int = SEQUENCES,
    tokens: int = TOKENS,
    progress: Progress | None = None,
    seed: int = 0,
) -> Calibration:
    """Samples text from the model and differentiates its loss with respect to keys and values.

    Takes about one backward pass a sequence; for a 135M model and 6 x 1,024 tokens minutes on one core.
    """
    tokens = min(tokens, model.config.get_text_config(decoder=True).max_position_embeddings)
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    was = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    requires = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    sums = _Sums(shape, next(model.parameters()).device)
    try:
        text = _sample(model, sequences, tokens, generator, progress)
        for i, row in enumerate(text):
            sums.add(model, row[None], generator)
            if progress:
                progress("calibrating", (i + 1) / sequences)
    finally:
        for parameter, required in zip(model.parameters(), requires, strict=True):
            parameter.requires_grad_(required)
        model.set_attn_implementation(was)
    return sums.result()


class _CapturingCache(DynamicCache):
    """Keeps the keys and values it is given as leaves of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pair = (key_states, value_states)
        for tensor in pair:
            tensor.requires_grad_() if tensor.is_leaf else tensor.retain_grad()
        self.seen[layer_idx] = pair
        return pair


class _Sums:
    """Running sums over calibration sequences."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self._shape = shape
        self._means = torch.zeros(
            2, shape.layers, shape.kv_heads, shape.head_dim, dtype=torch.float64, device=device
        )
        self._squares = torch.zeros(2, shape.layers, shape.kv_heads, dtype=torch.float64, device=device)
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(shape.layers)]
        self._tokens = 0

    def add(self, model: Any, ids: torch.Tensor, generator: torch.Generator) -> None:
        cache = _CapturingCache()
        with torch.enable_grad(), _QueryNorms(model, self._norms, self._shape):
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).logits[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for layer, pair in cache.seen.items():
            for side, tensor in enumerate(pair):
                assert tensor.grad is not None
                self._squares[side, layer] += tensor.grad[0].double().square().mean(-1).sum(-1)
                vectors = self._unrotated(layer, tensor.detach()[0]) if side == 0 else tensor.detach()[0]
                self._means[side, layer] += vectors.double().sum(1)
        self._tokens += ids.shape[1]

    def _unrotated(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        frequencies = self._shape.frequencies[self._shape.kind[layer]].to(keys.device)
        angle = torch.arange(keys.shape[1], device=keys.device, dtype=torch.float64)[:, None] * frequencies
        cos, sin = angle.cos().float(), angle.sin().float()
        first, second = keys.float().chunk(2, -1)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)

    def result(self) -> Calibration:
        means, squares = (self._means / self._tokens).float(), (self._squares / self._tokens).float()
        norms = torch.stack([torch.cat(part, -1).quantile(0.9, dim=-1) for part in self._norms])
        return Calibration(means[0], means[1], squares[0], squares[1], norms.float())


class _QueryNorms:
    """Collects ‖q‖² of every KV head's queries, as attention sees them."""

    def __init__(self, model: Any, norms: list[list[torch.Tensor]], shape: ModelShape) -> None:
        self._model, self._norms, self._shape = model, norms, shape

    def __enter__(self) -> None:
        norms, heads = self._norms, self._shape.kv_heads

        def watching(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            squared = query.detach()[0].float().square().sum(-1).view(heads, -1)
            norms[module.layer_idx].append(squared)
            return sdpa_attention_forward(module, query, *args, **kwargs)

        AttentionInterface.register("qaq-calibration", watching)
        AttentionMaskInterface.register("qaq-calibration", sdpa_mask)
        self._model.set_attn_implementation("qaq-calibration")

    def __exit__(self, *exc: object) -> None:
        self._model.set_attn_implementation("sdpa")


@torch.no_grad()
def _sample(
    model: Any, sequences: int, tokens: int, generator: torch.Generator, progress: Progress | None
) -> torch.Tensor:
    """[sequences, tokens] sampled at temperature 1 from the beginning-of-sequence token."""
    config = model.config.get_text_config(decoder=True)
    first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    first = first[0] if isinstance(first, list) else first
    if first is None:
        raise UnsupportedModelError("the model has neither a BOS nor an EOS token to sample from")
    device = next(model.parameters()).device
    ids = torch.full((sequences, 1), first, device=device)
    cache = DynamicCache()
    for step in range(tokens - 1):
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].float()
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        if progress and step % 32 == 0:
            progress("sampling", step / tokens)
    return ids
