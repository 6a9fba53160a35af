"""The attention of one query, corrected for the quantization of some rows.

A head's output is Σ p·v with p = e^(score − log Σ e^score). Where a packed row's key and value are known better, its
part of both sums is exchanged:

    out' = (out + Σ (p'·v' − p·v)) / (1 + Σ (p' − p))

p and v are what the packed rows gave, p' and v' what the better rows give with the same denominator as p. That is
attention as if the better rows had been held, without a second pass over the other tokens. The other tokens' part is
a difference in float32: of a head whose better rows leave the fraction f of its sum Σ e^score, the result's relative
error is up to about 1e-5 / f.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qaq_core.base.rope import rotate_pairs
from qaq_core.quantization.transforms import Transform


@dataclass(frozen=True)
class BetterRows:
    """Packed rows of n tokens of a layer, as they are held and as they should be.

    Attributes:
        head, position: int64 [n], KV head and position.
        held, better: float32 [2, n, head_dim], keys and values, transformed.
    """

    head: torch.Tensor
    position: torch.Tensor
    held: torch.Tensor
    better: torch.Tensor


def correct(
    out: torch.Tensor,
    query: torch.Tensor,
    log_sums: torch.Tensor,
    layer: int,
    transform: Transform,
    rows: BetterRows,
    kv_heads: int,
) -> None:
    """Corrects the output of a layer in place.

    Args:
        out: float32 [query_heads, head_dim].
        query: float32 [query_heads, head_dim], times the scaling of scores.
        log_sums: float32 [query_heads], log Σ e^score over all tokens.
    """
    heads, group = len(query), len(query) // kv_heads
    query = query.unsqueeze(1)
    transformed = transform.query(layer, query).squeeze(1)
    scores = torch.stack([transformed @ keys.T for keys in (rows.held[0], rows.better[0])])  # [2, query_heads, n]
    center = transform.center(layer, int(rows.position.max()) + 1)
    if center is not None:
        mean, angles = center
        scores += query.squeeze(1) @ rotate_pairs(mean[rows.head], angles[rows.position]).T
    own = torch.arange(heads, device=out.device).div(group, rounding_mode="floor").unsqueeze(1) == rows.head
    scores = (scores - log_sums.unsqueeze(-1)).masked_fill_(~own, float("-inf"))
    # A better key may have a far higher score: all of a head is scaled down by its highest.
    peak = scores[1].amax(-1, keepdim=True).clamp_min_(0.0)
    before, after = (scores - peak).exp_()
    rest, change = (-peak).exp_(), (after - before).sum(-1, keepdim=True)
    sums = after @ rows.better[1] - before @ rows.held[1]
    added = transform.restore(layer, sums.unsqueeze(1)).squeeze(1)
    value_center = transform.value_center(layer)
    if value_center is not None:
        added = added + change * value_center.repeat_interleave(group, 0)
    # What is left of the other tokens is not negative, however scores were rounded.
    out.mul_(rest).add_(added).div_(torch.maximum(rest + change, after.sum(-1, keepdim=True)))
