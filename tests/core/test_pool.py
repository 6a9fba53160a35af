"""The pool against a plain dictionary, through random appends and changes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.packing import WIDTHS
from qaq_core.pool import Pool, Rows
from tests.core.rows import HEAD_DIMS

LAYERS, HEADS = 2, 3

Model = dict[tuple[int, int, int], torch.Tensor]
"""Rows [head_dim/8, width] by (layer, head, token)."""


def grouped(model: Model) -> Rows:
    """Rows per width in (layer, head, token) order, without width 0."""
    rows: Rows = {}
    for width in WIDTHS[1:]:
        mine = [model[key] for key in sorted(model) if model[key].shape[1] == width]
        if mine:
            rows[width] = torch.stack(mine)
    return rows


def widths_of(model: Model, tokens: int) -> torch.Tensor:
    widths = torch.zeros(LAYERS, HEADS, tokens, dtype=torch.uint8)
    for key, row in model.items():
        widths[key] = row.shape[1]
    return widths


def agrees(pool: Pool, model: Model, tokens: int) -> None:
    expected = grouped(model)
    assert set(pool.rows) == set(expected)
    widths = widths_of(model, tokens)
    for width, rows in expected.items():
        assert torch.equal(pool.rows[width], rows)
        for layer in range(LAYERS):
            part = {key: row for key, row in model.items() if key[0] == layer and row.shape[1] == width}
            held = pool.layer(width, layer)
            assert len(held) == len(part)
            if part:
                assert torch.equal(held, grouped(part)[width])
        index = torch.nonzero(widths.reshape(-1) == width).squeeze(1).flip(0)
        assert torch.equal(pool.take(widths, index, width), rows.flip(0))
    assert pool.nbytes == sum(rows.numel() for rows in expected.values())


@given(data=st.data(), dim=st.sampled_from(HEAD_DIMS), seed=st.integers(0, 1 << 30))
def test_appends_and_changes_agree_with_a_dictionary(data: st.DataObject, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def row(width: int) -> torch.Tensor:
        return torch.randint(0, 256, (dim // 8, width), dtype=torch.uint8, generator=generator)

    pool, model, tokens = Pool(), Model(), 0
    some_width = st.sampled_from(WIDTHS)
    for _ in range(data.draw(st.integers(1, 6))):
        if tokens == 0 or data.draw(st.booleans()):
            added = data.draw(st.integers(1, 4))
            fresh = {
                (layer, head, token): row(data.draw(some_width))
                for layer in range(LAYERS)
                for head in range(HEADS)
                for token in range(added)
            }
            pool.append(widths_of(model, tokens), widths_of(fresh, added), grouped(fresh))
            model |= {(layer, head, tokens + token): r for (layer, head, token), r in fresh.items()}
            tokens += added
        else:
            chosen = sorted(data.draw(st.sets(st.sampled_from(sorted(model)), min_size=1)))
            moved = {key: row(data.draw(some_width)) for key in chosen}
            index = torch.tensor([(layer * HEADS + head) * tokens + token for layer, head, token in chosen])
            new = torch.tensor([moved[key].shape[1] for key in chosen], dtype=torch.uint8)
            pool.change(widths_of(model, tokens), index, new, grouped(moved))
            model |= moved
        agrees(pool, model, tokens)


def test_a_pool_holds_no_more_than_its_rows() -> None:
    """A slice of a larger buffer that is appended does not keep the buffer alive."""
    whole = torch.zeros(100, 4, 2, dtype=torch.uint8)
    pool = Pool()
    widths = torch.zeros(1, 1, 1, dtype=torch.uint8)
    pool.append(widths[:, :, :0], widths + 2, {2: whole[:1]})
    assert pool.nbytes == 8
