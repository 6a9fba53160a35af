"""Attention masks: what transformers makes of a 2-D mask, and whether a mask hides just what the cache hides.

A QAQ cache attends causally, within a sliding window where the layer has one, and knows padding by the 2-D mask. So a
plain mask is never made: `qaq_mask` hands the 2-D mask to the cache, and attention gets none. Any other mask is made or
passed on as it is, and `MaskCheck` compares it with what the cache does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.masking_utils import sdpa_mask

from qaq_core.base.errors import UnsupportedModelError

_HIDDEN = -1e4
"""An additive mask of this or less leaves nothing of a score."""
_ROWS = 512
"""Rows of a mask that are compared at a time."""


class Announced(Protocol):
    def announce(self, attention_mask: torch.Tensor | None) -> None: ...


class MaskColumns(int):
    """How many columns a mask has to have, and the cache that said so: this is how `qaq_mask` learns of the cache."""

    cache: Announced

    @classmethod
    def of(cls, columns: int, cache: Announced) -> MaskColumns:
        made = cls(columns)
        made.cache = cache
        return made


def qaq_mask(
    *,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> torch.Tensor | None:
    """The mask that transformers asks for; see `transformers.masking_utils.sdpa_mask`.

    Args:
        attention_mask: bool [batch, columns]; False is padding.
        local_size: of a sliding window or chunk. What kind it is, only the mask itself tells.
    Returns:
        bool [batch, 1, n, columns]. None where a QAQ cache hides what has to be hidden; for other caches as with SDPA.
    """
    cache = getattr(kv_length, "cache", None)
    if cache is not None:
        cache.announce(attention_mask)
        if allow_is_causal_skip and (local_size is None or kv_length < local_size):
            return None
        allow_is_causal_skip = allow_is_bidirectional_skip = False
    return sdpa_mask(
        kv_length=int(kv_length),
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **others,
    )


def own_columns(mask: torch.Tensor, batch: int, n: int) -> torch.Tensor:
    """Which of a pass's n columns are tokens, bool [batch, n]: those that see themselves.

    Args:
        mask: [batch or 1, heads or 1, n, columns].
    """
    seen = _seen(mask)[:, 0]
    if seen.shape[1] != n or seen.shape[2] < n:
        raise _refused(f"it has the shape {list(mask.shape)}, and the pass has {n} columns")
    return seen[:, :, -n:].diagonal(dim1=1, dim2=2).expand(batch, n)


class MaskCheck:
    """Compares the masks of one forward pass with what the cache attends to.

    Args:
        columns: that the mask should have: all so far and the pass's n.
        tokens: bool [batch, columns], which of them are tokens; None if all are.
        own: only the last n columns can be compared, as sequences of different lengths share the others.
    """

    def __init__(self, columns: int, n: int, tokens: torch.Tensor | None, own: bool = False) -> None:
        self._columns, self._n, self._tokens, self._own = columns, n, tokens, own
        # Layers share masks. One that is kept here cannot share its address with another.
        self._known: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, mask: torch.Tensor, sliding_window: int | None) -> None:
        """Raises UnsupportedModelError if this mask of a layer hides other tokens than the cache does."""
        if not isinstance(mask, torch.Tensor):
            raise _refused(f"it is a {type(mask).__name__}")
        key = (mask.data_ptr(), mask.shape, mask.stride(), sliding_window)
        if key not in self._known:
            self._compare(mask, sliding_window)
            self._known[key] = mask

    def _compare(self, mask: torch.Tensor, sliding_window: int | None) -> None:
        n = self._n
        if mask.dim() != 4 or mask.shape[2:] != (n, self._columns):
            raise _refused(
                f"it has the shape {list(mask.shape)}, and the pass has {n} columns of {self._columns}, "
                "those in the cache included"
            )
        tokens = self._tokens
        if tokens is None:
            tokens = torch.ones(1, self._columns, dtype=torch.bool, device=mask.device)
        place = tokens.cumsum(1)
        first = self._columns - n
        compared = slice(first, None) if self._own else slice(None)
        for start in range(0, n, _ROWS):
            rows = slice(first + start, first + min(start + _ROWS, n))
            query, key = place[:, rows, None], place[:, None, compared]
            expected = tokens[:, None, compared] & (key <= query)
            if sliding_window is not None:
                expected &= key > query - sliding_window
            seen = _seen(mask[:, :, start : start + _ROWS, compared])
            wrong = (seen != expected[:, None]) & tokens[:, None, rows, None]
            if wrong.any():
                raise _refused("it hides or shows other tokens")


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bool, True for what is attended to."""
    if mask.dim() != 4:
        raise _refused(f"it has the shape {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not torch.all(seen | (mask <= _HIDDEN)):
        raise _refused("it adds a bias to the scores (ALiBi or relative positions)")
    return seen


def _refused(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the attention mask is none that a QAQ cache serves: {why}. It serves causal attention, sliding windows and "
        "padding on the left; use DynamicCache for blocks of documents, bidirectional prefixes, and biases"
    )
