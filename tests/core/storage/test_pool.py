"""The pool and both weavers against a plain dictionary, through random appends and changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.widths import WIDTHS
from qaq_core.cache.backends import make_repacker
from qaq_core.kernels import load_library
from qaq_core.quantization.bit_planes import tags_of
from qaq_core.storage.pool import Pool, Rows
from qaq_core.storage.repack import Moves
from tests.core.rows import HEAD_DIMS

LAYERS, HEADS = 2, 3
KERNELS = ["reference", *(["cpu"] if load_library() else [])]

Model = dict[tuple[int, int, int], torch.Tensor]
"""Rows [width, bytes of half a bit] by (layer, head, token)."""


def grouped(model: Model) -> Rows:
    """Rows per width in (layer, head, token) order, without width 0."""
    rows: Rows = {}
    for width in WIDTHS[1:]:
        mine = [model[key] for key in sorted(model) if len(model[key]) == width]
        if mine:
            rows[width] = torch.stack(mine).flatten(1)
    return rows


def tags(model: Model, tokens: int, side: int) -> torch.Tensor:
    """Tags as a block's: a view of a longer run of tags."""
    widths = torch.zeros(LAYERS, HEADS, tokens + 5, dtype=torch.uint8)
    for key, row in model.items():
        widths[key] = len(row)
    other = torch.full_like(widths, 3)
    return (tags_of(other, widths) if side else tags_of(widths, other))[:, :, :tokens]


def moves(before: Model, after: Model, tokens: int, keep: dict[tuple[int, int, int], int]) -> Moves:
    """From one to the other; `keep` names the rows that move and the planes they keep."""
    index, have, want, kept, planes, offsets, size = [], [], [], [], [], [], 0
    for layer, head, token in sorted(keep):
        key = layer, head, token
        rest = after[key][keep[key] :].reshape(-1)
        index.append((layer * HEADS + head) * tokens + token)
        have.append(len(before[key]) if key in before else 0)
        want.append(len(after[key]))
        kept.append(keep[key])
        planes.append(rest)
        offsets.append(size)
        size += len(rest)
    small = [torch.tensor(values, dtype=torch.uint8) for values in (have, want, kept)]
    return Moves(torch.tensor(index), *small, torch.cat(planes), torch.tensor(offsets))


def agrees(pool: Pool, model: Model, tokens: int, side: int) -> None:
    expected = grouped(model)
    assert set(pool.rows) == set(expected)
    held_tags = tags(model, tokens, side)
    for width, rows in expected.items():
        assert torch.equal(pool.rows[width], rows)
        first = pool.first[:, :, WIDTHS.index(width)]
        before = 0
        for layer in range(LAYERS):
            part = {key: row for key, row in model.items() if key[0] == layer and len(row) == width}
            held = pool.layer(width, layer)
            assert len(held) == len(part)
            for head in range(HEADS):
                assert int(first[layer, head]) == before
                before += sum(key[1] == head for key in part)
            if part:
                assert torch.equal(held, grouped(part)[width])
        index = torch.tensor(
            [
                (layer * HEADS + head) * tokens + token
                for layer, head, token in sorted(model)
                if len(model[layer, head, token]) == width
            ]
        ).flip(0)
        assert torch.equal(pool.take(held_tags, side, index, width), rows.flip(0))
    assert pool.nbytes == sum(rows.numel() for rows in expected.values()) + pool.first.numel() * 4


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data(), dim=st.sampled_from(HEAD_DIMS), seed=st.integers(0, 1 << 30))
def test_appends_and_changes_agree_with_a_dictionary(kernel: str, data: st.DataObject, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def row(width: int, start: torch.Tensor | None = None) -> torch.Tensor:
        fresh = torch.randint(0, 256, (width, dim // 16), dtype=torch.uint8, generator=generator)
        if start is not None:
            fresh[: len(start)] = start
        return fresh

    side = data.draw(st.sampled_from((KEY, VALUE)))
    pool = Pool(make_repacker(torch.device("cpu"), kernel), dim // 16)
    model, tokens = Model(), 0
    some_width = st.sampled_from(WIDTHS)
    for _ in range(data.draw(st.integers(1, 6))):
        before, had = dict(model), tokens
        keep: dict[tuple[int, int, int], int] = {}
        if tokens == 0 or data.draw(st.booleans()):
            tokens += data.draw(st.integers(1, 4))
            for key in [(i, j, t) for i in range(LAYERS) for j in range(HEADS) for t in range(had, tokens)]:
                model[key], keep[key] = row(data.draw(some_width)), 0
        else:
            for key in data.draw(st.sets(st.sampled_from(sorted(model)), min_size=1)):
                width = data.draw(some_width)
                held = model[key]
                keep[key] = data.draw(st.integers(0, min(width, len(held))))
                model[key] = row(width, held[: keep[key]])
        after = tags(model, tokens, side)
        pool.repack(tags(before, had, side), after, side, moves(before, model, tokens, keep))
        agrees(pool, model, tokens, side)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data(), dim=st.sampled_from(HEAD_DIMS), seed=st.integers(0, 1 << 30))
def test_narrowing_leaves_the_beginning_of_every_row(kernel: str, data: st.DataObject, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    side, tokens = data.draw(st.sampled_from((KEY, VALUE))), data.draw(st.integers(1, 9))
    model: Model = {}
    for key in [(i, j, t) for i in range(LAYERS) for j in range(HEADS) for t in range(tokens)]:
        width = data.draw(st.sampled_from(WIDTHS[:-1]))
        model[key] = torch.randint(0, 256, (width, dim // 16), dtype=torch.uint8, generator=generator)
    pool = Pool(make_repacker(torch.device("cpu"), kernel), dim // 16)
    before = tags(model, tokens, side)
    pool.repack(tags({}, 0, side), before, side, moves({}, model, tokens, dict.fromkeys(model, 0)))
    most = data.draw(st.sampled_from(WIDTHS[:-1]))
    cut = {key: row[: most if (sum(key) + seed) % 3 else len(row)] for key, row in model.items()}
    pool.narrow(before, tags(cut, tokens, side), side)
    agrees(pool, cut, tokens, side)


@pytest.mark.parametrize("kernel", KERNELS)
def test_widths_that_nothing_comes_to_or_leaves_are_not_copied(kernel: str) -> None:
    pool = Pool(make_repacker(torch.device("cpu"), kernel), 1)
    model: Model = {
        (i, j, t): torch.full((1 + t, 1), t, dtype=torch.uint8)
        for i in range(LAYERS)
        for j in range(HEADS)
        for t in range(3)
    }
    pool.repack(tags({}, 0, KEY), tags(model, 3, KEY), KEY, moves({}, model, 3, dict.fromkeys(model, 0)))
    held = dict(pool.rows)
    after = {**model, (1, 1, 1): torch.full((1, 1), 9, dtype=torch.uint8)}
    pool.repack(tags(model, 3, KEY), tags(after, 3, KEY), KEY, moves(model, after, 3, {(1, 1, 1): 0}))
    assert pool.rows[3] is held[3]
    assert pool.rows[1] is not held[1]
    agrees(pool, after, 3, KEY)


def test_a_pool_holds_no_more_than_its_rows() -> None:
    """Rows that are taken from a larger buffer do not keep the buffer alive."""
    whole = torch.zeros(100, dtype=torch.uint8)
    one = torch.full((1, 1, 1), 2, dtype=torch.uint8)
    for kernel in KERNELS:
        pool = Pool(make_repacker(torch.device("cpu"), kernel), 4)
        nothing = torch.zeros(1, dtype=torch.uint8)
        coming = Moves(torch.zeros(1, dtype=torch.long), nothing, one.view(1), nothing, whole, torch.zeros(1).long())
        pool.repack(one[:, :, :0], tags_of(one, one), KEY, coming)
        assert pool.nbytes == 8 + 4 * len(WIDTHS)
