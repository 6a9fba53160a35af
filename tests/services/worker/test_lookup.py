"""Prompt lookup drafts what followed when the log's end occurred before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.lookup import NGRAMS, PromptLookup


@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 3, [3, 4, 5]),
        ([1, 2, 3, 4, 5, 1, 2], 0, []),
        ([1, 2, 3, 4, 5, 1, 2], -1, []),
        ([1, 2, 9, 1, 2, 8, 1, 2], 1, [8]),  # the last time
        ([7, 1, 2, 9, 5, 1, 2, 8, 7, 1, 2], 1, [9]),  # the longest that matches
        ([5, 6, 5, 6], 5, [5, 6, 5, 6, 5]),  # on and on
        ([4, 4, 4], 4, [4, 4, 4, 4]),
        ([1, 2, 3, 1], 3, []),  # one token is not enough
        ([1], 3, []),
        ([], 3, []),
    ],
)
def test_what_is_drafted(tokens: list[int], limit: int, expected: list[int]) -> None:
    assert PromptLookup().draft(tokens, limit) == expected


def test_a_draft_that_was_right_goes_on_where_it_came_from() -> None:
    """The copied passage has a pair of tokens whose last occurrence is elsewhere."""
    passage = [1, 2, 3, 4, 5, 6, 7, 8]
    tokens, lookup = [*passage, 0, 4, 5, 9, 9, 1, 2], PromptLookup()
    copied = []
    for _ in range(6):
        draft = lookup.draft(tokens, 1)
        copied += draft
        tokens += draft
    assert copied == passage[2:]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 6))
def test_every_draft_follows_an_earlier_occurrence(tokens: list[int], limit: int) -> None:
    lookup = PromptLookup()
    for end in range(len(tokens) + 1):
        log = tokens[:end]
        draft = lookup.draft(log, limit)
        occurs = [at for at in range(2, end) if log[at - 2 : at] == log[-2:]]
        assert bool(draft) >= bool(occurs)
        if draft:
            whole = log + draft
            assert any(whole[at : at + limit] == draft and log[at - 1] == log[-1] for at in range(1, end))
    assert min(NGRAMS) == 2
