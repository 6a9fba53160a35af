"""What was decided for the packed tokens of a sequence, row by row."""

from __future__ import annotations

import torch

from qaq_core.attention.reference import ReferenceAttention
from qaq_core.base.pages import KEY, VALUE
from qaq_core.cache.sequence import SequenceCache


def decisions(sequence: SequenceCache) -> dict[str, torch.Tensor]:
    """Tags, meta bytes, rows as attention reads them, importance."""
    packed, method = sequence.packed, sequence.method
    reader = ReferenceAttention(method.quantizer.codec, method.device)
    found = {"tags": packed.tags, "importance": sequence.importance.state[:, :, : sequence.length]}
    for side, name in ((KEY, "key"), (VALUE, "value")):
        found[f"{name} meta"] = packed.metas[side]
        rows = [reader.unpack(packed, side, layer) for layer in range(method.shape.layers)]
        found[f"{name} rows"] = torch.stack(rows)
    return found


def differing(one: SequenceCache, other: SequenceCache) -> dict[str, float]:
    """Share of the numbers of each of `decisions` that are not the same. The sequences must be as long."""
    ours, theirs = decisions(one), decisions(other)
    return {name: float((ours[name] != theirs[name]).float().mean()) for name in ours}
