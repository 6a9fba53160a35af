"""Prompt lookup: drafts of a sequence's next tokens, from where it said the same before."""

from __future__ import annotations

from collections.abc import Sequence

NGRAMS = (4, 3, 2)
"""How many last tokens must have occurred before, the longest first."""


class PromptLookup:
    """Drafts from one token log, which may only grow."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token behind its last occurrence
        self._indexed = 0
        self._distance = 0

    def draft(self, tokens: Sequence[int], limit: int) -> list[int]:
        """What followed when the log's end occurred before: at most `limit` tokens, none if it never did.

        It goes on from where the draft before came from, as long as that was right.
        """
        end = len(tokens)
        if not self._distance or tokens[end - 1] != tokens[end - 1 - self._distance]:
            self._distance = self._search(tokens)
        draft: list[int] = []
        while self._distance and len(draft) < limit:
            at = end + len(draft) - self._distance
            draft.append(tokens[at] if at < end else draft[at - end])
        return draft

    def _search(self, tokens: Sequence[int]) -> int:
        """How far back the last occurrence of the log's end is; 0 if there is none."""
        for stop in range(self._indexed + 1, len(tokens)):
            for size in NGRAMS:
                if size <= stop:
                    self._behind[tuple(tokens[stop - size : stop])] = stop
        self._indexed = len(tokens) - 1
        for size in NGRAMS:
            at = self._behind.get(tuple(tokens[-size:]))
            if at is not None and size <= len(tokens):
                return len(tokens) - at
        return 0
