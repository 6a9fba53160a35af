"""How much an error in a head's keys or values costs: F, the Fisher information of a vector.

F = E[g gᵀ], g the gradient of the loss on labels the model samples itself, summed over all later positions. For a
small error δ the model's predictions move by a KL of ½ δᵀ F δ. The mean is over tokens that can be quantized: most of a
head's attention goes to the first few, which stay exact, and so does up to 99% of Σ g gᵀ. Two ways to measure it:

by gradients      exact up to sampling; needs the activations of a text in memory
by perturbation   adds a little noise to one head's vectors and measures that KL: F's trace, by forward passes only
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from qaq_core.calibration.moments import SINKS
from qaq_core.models.shape import ModelShape

NOISE = 0.1
"""Deviation of the perturbation, in deviations of the head's own numbers."""

LOGITS = 1 << 24
"""Logits that are in memory at a time: a large vocabulary's would outweigh everything else."""


class Seen(DynamicCache):
    """Keeps the keys and values of a forward pass, after RoPE, by layer.

    With `differentiate` they keep their gradients. With `noise` they are perturbed: {(layer, side): deviation of
    each KV head [kv_heads]}, row i of the batch in head i alone.
    """

    def __init__(
        self,
        differentiate: bool = False,
        noise: dict[tuple[int, int], torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._differentiate, self._noise, self._generator = differentiate, noise or {}, generator

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sides = [key_states, value_states]
        for side, tensor in enumerate(sides):
            if self._differentiate:
                tensor.requires_grad_() if tensor.is_leaf else tensor.retain_grad()
            if (layer_idx, side) in self._noise:
                sides[side] = self._perturbed(tensor, self._noise[layer_idx, side])
        self.pairs[layer_idx] = (sides[0], sides[1])
        return self.pairs[layer_idx]

    def _perturbed(self, tensor: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        for head, size in enumerate(deviation):
            own = tensor[head, head]
            drawn = torch.randn(own.shape, generator=self._generator, device=own.device) * size
            drawn[:SINKS] = 0.0
            tensor[head, head] = (own.float() + drawn).to(own.dtype)
        return tensor


def by_gradients(model: Any, shape: ModelShape, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Σ over positions from SINKS on of g gᵀ [2, layers, kv_heads, head_dim, head_dim] for ids [1, n]."""
    seen = Seen(differentiate=True)
    with torch.enable_grad():
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = _body(model, embeddings, seen)
        leaf = hidden.detach().requires_grad_()
        for first, last in _pieces(model, ids.shape[1]):
            logits = _head(model, leaf[:, first:last])[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        hidden.backward(leaf.grad)
    dims = (2, shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
    products = torch.zeros(dims, dtype=torch.float64, device=ids.device)
    for layer, pair in seen.pairs.items():
        for side, tensor in enumerate(pair):
            assert tensor.grad is not None
            gradient = tensor.grad[0, :, SINKS:].double()
            products[side, layer] = gradient.mT @ gradient
    return products


@torch.no_grad()
def by_perturbation(
    model: Any, shape: ModelShape, ids: torch.Tensor, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Σ over positions from SINKS on of trace(F)/head_dim, without gradients: [2, kv_heads], layer after layer."""
    embeddings = model.get_input_embeddings()(ids)
    seen = Seen()
    clean = _body(model, embeddings, seen)
    several = embeddings.expand(shape.kv_heads, -1, -1)
    for layer in range(shape.layers):
        sums = []
        for side in range(2):
            own = seen.pairs[layer][side][0].float()
            deviation = NOISE * (own - own.mean(1, keepdim=True)).square().mean((1, 2)).sqrt()
            moved = _body(model, several, Seen(noise={(layer, side): deviation}, generator=generator))
            # KL = ½ · deviation² · Σ trace(F)
            divergence = _divergence(model, clean, moved)
            sums.append(2 * divergence / (deviation.double().square().clamp_min(1e-30) * shape.head_dim))
        yield torch.stack(sums)


def gradient_bytes(model: Any, tokens: int) -> int:
    """Memory that `by_gradients` needs for a text of that length, beside the weights.

    Counted on two short texts, and extrapolated: what a layer saves for its backward pass grows linearly with the
    text, or with its square where attention keeps its probabilities.
    """
    short, longer = 16, 32
    counts = [_saved_bytes(model, n) for n in (short, longer)]
    square = max(0.0, (counts[1] / longer - counts[0] / short) / (longer - short))
    linear = counts[0] / short - square * short
    # Twice, for what backward makes and the allocator holds on to; logits, their softmax and two gradients.
    return round(2 * (linear * tokens + square * tokens**2)) + 4 * 4 * LOGITS


def free_bytes(device: torch.device) -> int:
    """Memory that is free where the model is."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _saved_bytes(model: Any, tokens: int) -> int:
    """What autograd keeps of a forward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding on to them keeps addresses from being used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        _body(model, embeddings, Seen(differentiate=True))
    return sum(storage.nbytes() for storage in kept.values())


def _divergence(model: Any, clean: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Σ over positions of KL(clean ‖ moved), float64 [rows], of hidden states [1, n, size] and [rows, n, size]."""
    total = torch.zeros(len(moved), dtype=torch.float64, device=moved.device)
    for first, last in _pieces(model, clean.shape[1]):
        exact = _head(model, clean[:, first:last]).float().log_softmax(-1)
        for row, hidden in enumerate(moved):
            got = _head(model, hidden[None, first:last]).float().log_softmax(-1)
            total[row] += (exact.exp() * (exact - got)).sum(dtype=torch.float64)
    return total.clamp_min(0)


def _pieces(model: Any, tokens: int) -> Iterator[tuple[int, int]]:
    """Spans of positions whose logits are in memory together."""
    size = max(1, LOGITS // model.config.get_text_config(decoder=True).vocab_size)
    for first in range(0, tokens, size):
        yield first, min(first + size, tokens)


def _body(model: Any, embeddings: torch.Tensor, cache: Seen) -> torch.Tensor:
    """Last hidden states [batch, n, size]."""
    hidden: torch.Tensor = model.get_decoder()(
        inputs_embeds=embeddings, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return hidden


def _head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states: the model's own forward pass, with what its decoder says given."""
    with _saying(model.get_decoder(), BaseModelOutputWithPast(last_hidden_state=hidden)):
        logits: torch.Tensor = model(inputs_embeds=hidden, use_cache=False).logits
    return logits


@contextmanager
def _saying(module: torch.nn.Module, answer: Any) -> Iterator[None]:
    """While this lasts, the module's forward pass is that answer."""
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del module.forward
