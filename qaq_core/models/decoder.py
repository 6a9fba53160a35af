"""The forward pass of Llama-like decoders over few tokens: decode steps and drafts.

It is the arithmetic of transformers' modules with the same weights, which are read where they lie. Left out is what
transformers does around it for every kind of model: masks, outputs, one module for each product and norm. With the C++
library the pieces are C++ (`kernels.dense`), and a row's results do not depend on the batch that it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qaq_core.attention.base import LayerInput
from qaq_core.attention.interface import Attendable
from qaq_core.base.errors import UnsupportedModelError
from qaq_core.kernels import native_library
from qaq_core.kernels.dense import GATES, MOST_ROWS, Linear, NativeDense
from qaq_core.models.dense import TorchDense
from qaq_core.models.linear import Float32Linear, PackedLinear

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")
"""Of transformers, by how their classes are called."""
_GEMMA = "Gemma3"


@dataclass(frozen=True)
class Norm:
    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True)
class DecoderLayer:
    """x += after_attention(output(attention(rotate(heads(before_attention(x))))));
    x += after_gate(down(gate(gate_up(before_gate(x))))).

    Attributes:
        after_attention, after_gate: None where sums are not normed.
        head_norms: weights of the norms of queries and keys; None without.
        kind: which rotation, see `Decoder`.
    """

    before_attention: Norm
    heads: Linear
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    output: Linear
    after_attention: Norm | None
    before_gate: Norm
    gate_up: Linear
    down: Linear
    after_gate: Norm | None
    scaling: float
    sliding_window: int | None
    kind: str | None


class Decoder:
    """A model's forward pass over a QAQ cache. Hooks of the model itself are not called.

    Raises:
        UnsupportedModelError: the model is none of those whose arithmetic is known here; the message says why.
    """

    def __init__(self, model: Any) -> None:
        _check(model)
        library = native_library(model.device)
        sizes = {module.in_features for module in model.modules() if isinstance(module, nn.Linear | PackedLinear)}
        native = library is not None and all(size % 16 == 0 for size in sizes)
        self._dense: Any = NativeDense(library) if native else TorchDense()
        self.name = "native" if native else "torch"
        inner, config, gemma = model.model, model.config, _family(model) == _GEMMA
        self._config, self._gate = config, config.hidden_activation if gemma else config.hidden_act
        first = inner.layers[0].self_attn
        self._heads = config.num_attention_heads, config.num_key_value_heads, first.head_dim
        self._embed, self._rotary, self._gemma = inner.embed_tokens, inner.rotary_emb, gemma
        self._layers = [self._layer(layer) for layer in inner.layers]
        self._norm, self._output = self._read_norm(inner.norm), self._linear([model.lm_head])

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, cache: Attendable, keep: int = 1) -> torch.Tensor:
        """Logits [batch, keep, vocabulary] after the last `keep` tokens.

        Args:
            ids, positions: int64 [batch, n], without padding.
        """
        batch, n = ids.shape
        cache.check_model(self._config)
        x: torch.Tensor = self._embed(ids).flatten(0, 1)
        tables = self._tables(x, positions)
        change = None
        for index, layer in enumerate(self._layers):
            joint = layer.heads(self._normed(x, layer.before_attention, change))
            epsilon = layer.before_attention.epsilon
            parts = self._dense.rotate(joint, self._heads, layer.head_norms, epsilon, tables[layer.kind])
            query, key, value = (part.unflatten(0, (batch, n)).transpose(1, 2) for part in parts)
            given = LayerInput(index, query, key, value, layer.scaling, layer.sliding_window)
            attended = cache.attend(given, positions).transpose(1, 2).reshape(batch * n, -1)
            change = self._changed(layer.output(attended), layer.after_attention)
            both = layer.gate_up(self._normed(x, layer.before_gate, change))
            change = self._changed(layer.down(self._dense.gate(both, self._gate)), layer.after_gate)
        x = self._normed(x, self._norm, change).unflatten(0, (batch, n))[:, -keep:]
        return self._output(x.flatten(0, 1)).unflatten(0, (batch, keep))

    def _normed(self, x: torch.Tensor, norm: Norm, change: torch.Tensor | None) -> torch.Tensor:
        """The norm of x + change, which x becomes."""
        normed: torch.Tensor = self._dense.norm(x, norm.weight, norm.epsilon, change)
        return normed

    def _changed(self, change: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return change if norm is None else self._normed(change, norm, None)

    def _tables(self, x: torch.Tensor, positions: torch.Tensor) -> dict[str | None, tuple[torch.Tensor, ...]]:
        """Cosines and sines [batch * n, head_dim] of each kind of rotation, from the model's own module."""
        kinds = {layer.kind for layer in self._layers}
        made = {kind: self._rotary(x, positions, *([kind] if self._gemma else [])) for kind in kinds}
        return {kind: tuple(part.flatten(0, 1).contiguous() for part in both) for kind, both in made.items()}

    # -- reading a model's modules ---------------------------------------------------------------------

    def _layer(self, layer: Any) -> DecoderLayer:
        attention, mlp, gemma = layer.self_attn, layer.mlp, self._gemma
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        window = getattr(attention, "sliding_window", None)
        if _name_of(attention) == "MistralAttention":
            window = getattr(attention.config, "sliding_window", None)
        after = self._read_norm(layer.post_attention_layernorm)
        return DecoderLayer(
            before_attention=self._read_norm(layer.input_layernorm),
            heads=self._linear([attention.q_proj, attention.k_proj, attention.v_proj]),
            head_norms=None if None in norms else tuple(self._read_norm(norm).weight for norm in norms),  # type: ignore[arg-type]
            output=self._linear([attention.o_proj]),
            after_attention=after if gemma else None,
            before_gate=self._read_norm(layer.pre_feedforward_layernorm) if gemma else after,
            gate_up=self._linear([mlp.gate_proj, mlp.up_proj]),
            down=self._linear([mlp.down_proj]),
            after_gate=self._read_norm(layer.post_feedforward_layernorm) if gemma else None,
            scaling=attention.scaling,
            sliding_window=window,
            kind=attention.layer_type if gemma else None,
        )

    def _read_norm(self, norm: Any) -> Norm:
        weight = norm.weight.detach()
        return Norm(1.0 + weight if self._gemma else weight, norm.eps if self._gemma else norm.variance_epsilon)

    def _linear(self, modules: Sequence[Any]) -> Linear:
        """Linear layers that take the same rows, as one: those in float32 by their weights, others by themselves."""
        if all(isinstance(module, nn.Linear | Float32Linear) for module in modules):
            linear: Linear = self._dense.linear([(module.weight, module.bias) for module in modules])
            return linear
        return lambda x: torch.cat([module(x) for module in modules], -1) if len(modules) > 1 else modules[0](x)


def _family(model: Any) -> str:
    return next((family for family in FAMILIES if type(model).__name__ == f"{family}ForCausalLM"), "")


def _name_of(module: Any) -> str:
    """The name of a class of transformers; "" of others."""
    return type(module).__name__ if type(module).__module__.startswith("transformers.models.") else ""


def _check(model: Any) -> None:
    """Raises UnsupportedModelError if a model's forward pass is another than the one here."""
    family, name = _family(model), type(model).__name__
    if not family or not _name_of(model):
        raise UnsupportedModelError(f"{name} is none of transformers' {', '.join(FAMILIES)}")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UnsupportedModelError(f"it computes in {model.dtype} on {model.device.type}, not in float32 on the CPU")
    config = model.config
    if (getattr(config, "hidden_activation", None) if family == _GEMMA else config.hidden_act) not in GATES:
        raise UnsupportedModelError(f"its activation is none of {', '.join(GATES)}")
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise UnsupportedModelError("it caps its logits")
    known = {
        *(f"{family}{part}" for part in ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")),
        *(f"{family}RotaryEmbedding", "Gemma3TextModel", "Gemma3TextScaledWordEmbedding"),
    }
    for path, module in model.named_modules():
        plain = type(module) in (nn.Linear, nn.Embedding, nn.ModuleList) or isinstance(module, PackedLinear)
        if not plain and _name_of(module) not in known and not path.endswith("act_fn"):
            raise UnsupportedModelError(f"its module {path} is a {type(module).__name__}")
        hooked = module is not model and (module._forward_hooks or module._forward_pre_hooks)
        if "forward" in vars(module) or hooked:
            raise UnsupportedModelError(f"its module {path or name} is compiled or has hooks")


__all__ = ["FAMILIES", "MOST_ROWS", "Decoder", "DecoderLayer", "Norm"]
