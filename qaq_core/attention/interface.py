"""QAQ's attention in the transformers attention interface.

`QAQCache.update` stores nothing: it hands out the new keys as `NewKeys`, which know their cache and layer, and
attention over them goes to that cache. Whatever else a model does with them would leave out the tokens before them, so
it raises. Code that calls the model itself may name the cache to attention as the keyword argument `qaq_cache`. Calls
without a QAQ cache are transformers' own SDPA.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qaq_core.attention.base import LayerInput
from qaq_core.attention.masks import qaq_mask
from qaq_core.base.errors import ConfigError, UnsupportedModelError

NAME = "qaq"


class Attendable(Protocol):
    def attend(
        self, given: LayerInput, position_ids: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def check_model(self, config: Any) -> None:
        """Raises UnsupportedModelError if the cache was made for other layers than those of that configuration."""
        ...


class Source(NamedTuple):
    """The cache and layer that new keys and values belong to."""

    cache: Attendable
    layer: int
    keys: torch.Tensor
    values: torch.Tensor


class NewKeys(torch.Tensor):
    """The new keys of a layer, which the attention of their cache alone may read."""

    source: Source

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """A model may look at their shape, and copy them as they are. Anything else is attention without the cache."""
        looks, copies = func in _LOOKS, func in _COPIES
        if not looks and not copies:
            raise _lost(_layer_of(args), getattr(func, "__name__", ""))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if looks:
            return result
        source = args[0].source
        if (result.shape, result.dtype, result.device) != (source.keys.shape, source.keys.dtype, source.keys.device):
            raise _lost(source.layer, getattr(func, "__name__", ""))
        return _handed_out(result, source)


_LOOKS = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_quantized")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "stride", "numel", "is_contiguous", "is_floating_point")),
    torch.is_floating_point,
    torch.numel,
    torch.Tensor.__len__,
    torch.Tensor.__repr__,
}
_COPIES = {torch.clone, *(getattr(torch.Tensor, name) for name in ("clone", "contiguous", "to", "detach"))}


def _handed_out(keys: torch.Tensor, source: Source) -> NewKeys:
    made = keys.as_subclass(NewKeys)
    made.source = source
    return made


def _layer_of(args: tuple[Any, ...]) -> int | None:
    """The layer of the first new keys among a call's arguments."""
    flat = (part for arg in args for part in (arg if isinstance(arg, list | tuple) else (arg,)))
    return next((part.source.layer for part in flat if type(part) is NewKeys), None)


class _Updated(threading.local):
    """The update of this thread that attention has not followed yet."""

    cache: weakref.ref[Any] | None = None
    layer: int = 0

    def waiting(self) -> Any:
        """The cache that was updated, or None."""
        return None if self.cache is None else self.cache()


_updated = _Updated()


def hand_out(keys: torch.Tensor, values: torch.Tensor, cache: Attendable, layer: int) -> torch.Tensor:
    """New keys of that cache's layer as the model gets them.

    Raises:
        UnsupportedModelError: the layer before was updated, but its attention never reached the cache.
    """
    check_attended(cache)
    _updated.cache, _updated.layer = weakref.ref(cache), layer
    return _handed_out(keys, Source(cache, layer, keys, values))


def attended(cache: Attendable) -> None:
    """Attention over a layer of the cache has begun."""
    if _updated.waiting() is cache:
        _updated.cache = None


def check_attended(cache: Attendable) -> None:
    """Raises UnsupportedModelError if the cache was updated and attention did not follow."""
    if _updated.waiting() is cache:
        raise _lost(_updated.layer)


def _lost(layer: int | None, operation: str = "") -> UnsupportedModelError:
    _updated.cache = None
    used = f" (its keys went to {operation!r})" if operation else ""
    return UnsupportedModelError(
        f"layer {layer} updated a QAQ cache, but its attention did not reach the cache{used}: the model does not "
        "attend through transformers' attention interface, was switched to another attention implementation after the "
        "cache was made, is a copy that never had QAQ's, is compiled as a whole by torch.compile (compile_layers in "
        "qaq_core.models compiles its layers), or changes the keys or values that `update` returned; make "
        "the cache with QAQCache.for_model(model) of the very model that generates, or use DynamicCache"
    )


def qaq_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    qaq_step: bool = False,
    qaq_cache: Attendable | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [batch, query_heads, n, head_dim] over everything the cache holds.

    Args:
        attention_mask: compared with what the cache hides, see `MaskCheck`; None for causal attention.
        qaq_step: this is a layer that is compiled, see `models.compiled`.
        qaq_cache: the cache that was updated; if not given, the one that the keys are of.
    Returns:
        [batch, n, query_heads, head_dim] in the query's dtype.
    Raises:
        UnsupportedModelError: the keys or values are not those of the update, or attention is of a kind that the cache
            does not compute.
    """
    source = None if qaq_step else _source(key, value, qaq_cache)
    if source is None and not qaq_step:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            position_ids=position_ids,
            **kwargs,
        )
    check_outputs(kwargs)
    _check_kind(module, query, attention_mask, dropout, kwargs)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if source is None:
        out = torch.ops.qaq.attend(query, key, value, factor, sliding_window)
    else:
        if source.layer == 0:  # a configuration is slow to read
            config = getattr(module, "config", None)
            source.cache.check_model(config)
            check_outputs({"output_attentions": getattr(config, "output_attentions", False)})
        given = LayerInput(source.layer, query, source.keys, source.values, factor, sliding_window)
        out = _attend(source.cache, given, position_ids, attention_mask)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def _source(key: torch.Tensor, value: torch.Tensor, cache: Attendable | None) -> Source | None:
    """The cache and layer that keys belong to; None if they are no QAQ cache's."""
    if type(key) is NewKeys:
        source: Source = key.source
        if value is not source.values or _updated.waiting() is not source.cache:
            raise _lost(source.layer)
        return source
    waiting = _updated.waiting()
    if waiting is None:
        return None
    if cache is not None and waiting is cache:
        return Source(cache, _updated.layer, key, value)
    raise _lost(_updated.layer)


def check_outputs(asked: dict[str, Any]) -> None:
    """Raises ConfigError if a layer is asked for what a QAQ cache does not make."""
    if asked.get("output_attentions"):
        raise ConfigError(
            "a QAQ cache computes no attention probabilities that it could return: leave output_attentions unset, or "
            "use DynamicCache with attn_implementation='eager'"
        )


def _check_kind(
    module: torch.nn.Module, query: torch.Tensor, mask: torch.Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    """Refuses attention that the cache does not compute."""
    if others.get("s_aux") is not None or others.get("softcap") is not None:
        raise UnsupportedModelError("attention with learned sinks or capped logits is not supported by a QAQ cache")
    if others.get("position_bias") is not None:
        raise UnsupportedModelError("attention with a bias on its scores is not supported by a QAQ cache")
    if dropout:
        raise UnsupportedModelError("a QAQ cache attends without dropout: call model.eval() before")
    if mask is None and query.shape[2] > 1:
        causal = others.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise UnsupportedModelError(f"{type(module).__name__} attends in both directions; a QAQ cache is causal")


def _attend(
    cache: Attendable, given: LayerInput, position_ids: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention in the cache, which keeps no graph of what it stores; whoever differentiates is told."""
    if not torch.is_grad_enabled():
        return cache.attend(given, position_ids, mask)
    query, keys, values = given.query.detach(), given.keys.detach(), given.values.detach()
    with torch.no_grad():
        out = cache.attend(given._replace(query=query, keys=keys, values=values), position_ids, mask)
    attached: torch.Tensor = _NoGradient.apply(out, given.query)
    return attached


class _NoGradient(torch.autograd.Function):
    """Its output, for a graph that goes through attention in a cache."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise ConfigError("attention over a QAQ cache has no gradients: train without a cache, or with DynamicCache")


def use_qaq_attention(model: Any) -> None:
    """Switches a model to QAQ's attention; calls without a QAQ cache behave as with SDPA.

    Raises:
        UnsupportedModelError: the model keeps its own attention.
    """
    model.set_attn_implementation(NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise UnsupportedModelError(f"{type(model).__name__} keeps its own attention, whatever it is told to use")


AttentionInterface.register(NAME, qaq_attention)
AttentionMaskInterface.register(NAME, qaq_mask)
