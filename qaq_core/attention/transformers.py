"""QAQ's attention in the transformers attention interface.

`QAQCache.update` marks the keys it returns; attention on marked keys goes to the cache they belong to.
Any other call (no cache, or another cache) is transformers' own SDPA.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qaq_core.errors import UnsupportedModelError

NAME = "qaq"
_MARK = "_qaq_source"


class Attendable(Protocol):
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor: ...


class Source(NamedTuple):
    """Where marked keys come from."""

    cache: Attendable
    layer: int


def mark(keys: torch.Tensor, cache: Attendable, layer: int) -> torch.Tensor:
    """The same numbers, marked as new keys of that cache's layer."""
    marked = keys.view(keys.shape)
    setattr(marked, _MARK, Source(cache, layer))
    return marked


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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [batch, query_heads, n, head_dim] over everything the cache holds.

    Args:
        qaq_step: this is a layer that is compiled, see `compiled.py`.
    Returns:
        [batch, n, query_heads, head_dim] in the query's dtype.
    """
    source: Source | None = None if qaq_step else getattr(key, _MARK, None)
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
        out = source.cache.attend(source.layer, query, key, value, factor, sliding_window, position_ids)
    return out.transpose(1, 2).to(query.dtype), None


def use_qaq_attention(model: Any) -> None:
    """Switches a model to QAQ's attention; calls without a QAQ cache behave as with SDPA."""
    model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, qaq_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
