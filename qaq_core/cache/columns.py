"""The columns of a forward pass: which are tokens and which are padding, by the attention mask and by positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qaq_core.attention.masks import MaskCheck, own_columns
from qaq_core.base.errors import ConfigError

NEW_PROMPT = "for a new prompt, call reset() or make a new cache"


@dataclass(frozen=True)
class History:
    """What a cache holds when a forward pass begins.

    Attributes:
        lengths: tokens of each sequence.
        columns: seen so far, padding included.
        uneven: sequences of different lengths without padding: a column is not the same position in all of them.
        tokens: bool [batch, columns or more], which columns were tokens at the last pass with padding.
    """

    lengths: list[int]
    columns: int
    uneven: bool = False
    tokens: torch.Tensor | None = None

    @property
    def padded(self) -> bool:
        return not self.uneven and any(length != self.columns for length in self.lengths)

    def known(self, device: torch.device) -> torch.Tensor:
        """Which columns are tokens, bool [batch, columns]. Padding of which nothing else is known is on the left."""
        if self.tokens is not None and len(self.tokens) == len(self.lengths):
            known = self.tokens[:, : self.columns]
            if known.sum(1).tolist() == self.lengths:
                return known.to(device)
        first = self.columns - torch.tensor(self.lengths, device=device)
        return torch.arange(self.columns, device=device) >= first[:, None]


class Columns:
    """The columns that a cache has seen, and what the next forward pass says of its own.

    Args:
        lengths: tokens of each sequence.

    Attributes:
        count: columns seen, padding included.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.count = max(lengths, default=0)
        self._uneven = any(length != self.count for length in lengths)
        self._tokens: torch.Tensor | None = None
        self._announced: tuple[torch.Tensor | None] | None = None

    def announce(self, attention_mask: torch.Tensor | None) -> None:
        """The next forward pass has this 2-D mask, bool [batch, columns]; False is padding."""
        self._announced = (attention_mask,)

    def begin_pass(
        self,
        lengths: list[int],
        n: int,
        position_ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        sliding_window: int | None,
    ) -> tuple[list[int], MaskCheck]:
        """How many of the n columns of a pass are tokens of each sequence, the last ones, and the check of its masks.

        Args:
            lengths: tokens of each sequence. mask, sliding_window: the first layer's.
        Raises:
            ConfigError: mask or positions do not continue what the cache holds.
            UnsupportedModelError: the mask hides other tokens than the cache does.
        """
        announced, self._announced = self._announced, None
        history = History(lengths, self.count, self._uneven, self._tokens)
        tokens = tokens_of(history, n, announced, mask)
        fresh = fresh_tokens(tokens, len(lengths), n)
        if position_ids is not None:
            rows = (position_ids[0] if position_ids.dim() == 3 else position_ids).expand(len(lengths), -1).tolist()
            if announced is None and mask is None:
                fresh = fresh_by_positions(rows, history, n)
            else:
                check_positions(rows, history, n, fresh)
        check = MaskCheck(self.count + n, n, tokens, self._uneven)
        if mask is not None:
            check(mask, sliding_window)
        self._tokens = self._tokens if tokens is None else tokens
        return fresh, check

    def select(self, sequences: list[int]) -> None:
        """Takes the rows of those sequences."""
        if self._tokens is not None:
            self._tokens = self._tokens[sequences]


def tokens_of(
    history: History, n: int, announced: tuple[torch.Tensor | None] | None, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Which columns of the cache and of a pass over n more are tokens, bool [batch, columns]; None if all are.

    Args:
        announced: the 2-D mask bool [batch, columns] that the pass was given, or None in its place; None itself if the
            model did not ask for a mask.
        mask: [batch, heads, n, columns], the first layer's.
    Raises:
        ConfigError: the mask does not fit what the cache holds.
    """
    given = announced[0] if announced is not None else None
    batch, total = len(history.lengths), history.columns + n
    if given is not None:
        if given.shape[0] != batch or given.shape[1] < total:
            raise ConfigError(
                f"the attention mask is {list(given.shape)}, and the cache holds {history.columns} columns of {batch} "
                f"sequences, to which this pass adds {n}: give a mask over all of them, or, {NEW_PROMPT}"
            )
        given = given[:, :total]
        if not history.padded and given.all():
            return None
        if not history.uneven and not torch.equal(given[:, : history.columns], history.known(given.device)):
            raise ConfigError(
                "the attention mask says of columns that the cache holds already that tokens are padding, or padding "
                f"is tokens; repeat the earlier mask and add the new columns, or, {NEW_PROMPT}"
            )
        return given
    if mask is not None:
        tokens = torch.cat([history.known(mask.device), own_columns(mask, batch, n)], 1)
        return None if tokens.all() else tokens
    if announced is not None and history.padded:
        raise ConfigError(
            f"the cache holds padding, and this pass has no attention mask: give one over all {total} columns, those "
            "in the cache included"
        )
    return None


def fresh_tokens(tokens: torch.Tensor | None, batch: int, n: int) -> list[int]:
    """How many of a pass's n columns are tokens of each sequence: the last ones.

    Raises:
        ConfigError: they are not the last ones, or a sequence has none.
    """
    if tokens is None:
        return [n] * batch
    new = tokens[:, -n:]
    counts = new.sum(1)
    if not torch.equal(new, torch.arange(n, device=new.device) >= n - counts[:, None]):
        raise ConfigError(
            "the attention mask has padding after or between tokens: pad on the left (padding_side='left')"
        )
    if not counts.all():
        raise ConfigError("a sequence of the batch gets nothing but padding in this pass; leave it out")
    fresh: list[int] = counts.tolist()
    return fresh


def fresh_by_positions(rows: list[list[int]], history: History, n: int) -> list[int]:
    """As `fresh_tokens`, where no mask says it: padding has one position all along.

    Raises:
        ConfigError: the positions do not go on where the sequences end.
    """
    counts = []
    for length, row in zip(history.lengths, rows, strict=True):
        fresh = row[-1] + 1 - length
        if not 1 <= fresh <= n or len(set(row[: n - fresh])) > 1:
            raise _discontinued(length, row[0])
        counts.append(fresh)
    check_positions(rows, history, n, counts)
    return counts


def check_positions(rows: list[list[int]], history: History, n: int, fresh: list[int]) -> None:
    """Positions of new tokens go on where the sequence ends, counted in tokens or in columns.

    Raises:
        ConfigError
    """
    for length, row, count in zip(history.lengths, rows, fresh, strict=True):
        own = row[n - count :]
        expected = (length, history.columns + n - count)
        if own[0] not in expected or own != list(range(own[0], own[0] + count)):
            raise _discontinued(length, own[0])


def _discontinued(length: int, first: int) -> ConfigError:
    if length and first < length:
        return ConfigError(
            f"the cache holds {length} tokens already, and the positions of this pass begin at {first}: {NEW_PROMPT}"
        )
    return ConfigError(
        f"positions that begin at {first} do not continue the {length} tokens of the sequence: pad on the left and "
        "pass an attention mask"
    )
