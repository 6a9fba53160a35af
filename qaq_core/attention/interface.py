"""QAQ's attention in the transformers attention interface.

`QAQCache.update` stores nothing: it marks the new keys, and attention on marked keys goes to the cache that they
belong to. Code that calls the model itself passes the cache to attention as the keyword argument `qaq_cache`, which
needs no mark. Calls without a QAQ cache are transformers' own SDPA. A key that lost its mark on the way (a
`clone()` is enough) would be attended to without the tokens before it, so such a call raises.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qaq_core.attention.base import LayerInput
from qaq_core.base.errors import UnsupportedModelError

NAME = "qaq"
_MARK = "_qaq_source"


class Attendable(Protocol):
    def attend(self, given: LayerInput, position_ids: torch.Tensor | None) -> torch.Tensor: ...


class Source(NamedTuple):
    """The cache and layer that new keys belong to."""

    cache: Attendable
    layer: int


class _Updated(threading.local):
    """The update of this thread that attention has not followed yet."""

    cache: weakref.ref[Any] | None = None
    layer: int = 0

    def source(self) -> Source | None:
        cache = self.cache() if self.cache is not None else None
        return None if cache is None else Source(cache, self.layer)


_updated = _Updated()


def mark(keys: torch.Tensor, cache: Attendable, layer: int) -> torch.Tensor:
    """The same numbers, marked as new keys of that cache's layer.

    Raises:
        UnsupportedModelError: the layer before was updated, but its attention never reached the cache.
    """
    waiting = _updated.source()
    if waiting is not None and waiting.cache is cache:
        _updated.cache = None
        raise _lost(waiting.layer)
    _updated.cache, _updated.layer = weakref.ref(cache), layer
    marked = keys.view(keys.shape)
    setattr(marked, _MARK, Source(cache, layer))
    return marked


def attended(cache: Attendable) -> None:
    """Attention over a layer of the cache has begun."""
    waiting = _updated.source()
    if waiting is not None and waiting.cache is cache:
        _updated.cache = None


def _lost(layer: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {layer} updated a QAQ cache, but its attention did not reach the cache: the model does not attend "
        "through transformers' attention interface, uses another attention implementation, or replaces the keys that "
        "`update` returned; create the cache with QAQCache.for_model after the model is complete, or use DynamicCache"
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
        qaq_step: this is a layer that is compiled, see `models.compiled`.
        qaq_cache: the cache that was updated; if not given, the one that the keys are marked with.
    Returns:
        [batch, n, query_heads, head_dim] in the query's dtype.
    Raises:
        UnsupportedModelError: the keys lost their mark; or attention has learned sinks or capped logits.
    """
    source = None if qaq_step else _source(key, qaq_cache)
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
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise UnsupportedModelError("attention with learned sinks or capped logits is not supported")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if source is None:
        out = torch.ops.qaq.attend(query, key, value, factor, sliding_window)
    else:
        out = source.cache.attend(LayerInput(source.layer, query, key, value, factor, sliding_window), position_ids)
    return out.transpose(1, 2).to(query.dtype), None


def _source(key: torch.Tensor, cache: Attendable | None) -> Source | None:
    """The cache and layer that keys belong to; None if they are no QAQ cache's."""
    marked: Source | None = getattr(key, _MARK, None)
    waiting = _updated.source()
    if marked is not None or waiting is None:
        return marked
    if cache is not None and waiting.cache is cache:
        return waiting
    _updated.cache = None
    raise _lost(waiting.layer)


def use_qaq_attention(model: Any) -> None:
    """Switches a model to QAQ's attention; calls without a QAQ cache behave as with SDPA."""
    model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, qaq_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
