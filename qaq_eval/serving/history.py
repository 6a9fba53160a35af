"""What clients heard, token by token, and whether anything of it is wrong.

A history is what one client wrote down about one stream. The checker reads nothing else: not the servers' logs, not
their counters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

Kind = Literal["stream lost", "token lost", "token repeated", "out of order", "wrong end", "token changed"]


@dataclass(frozen=True)
class Entry:
    """One token: its index in the stream and the moment at which it came, in seconds of time.monotonic."""

    index: int
    token_id: int
    at: float


@dataclass
class History:
    """One stream, as its client heard it.

    Attributes:
        prompt: a name of what was asked. Streams of one prompt begin with the same tokens, if equality is defined.
        asked: number of tokens that it must have at its end.
        told: number of tokens that its last message named; None while there is none.
        error: why it broke, or "".
        ended: when it ended or broke; None while it runs.
    """

    name: str
    prompt: str
    asked: int
    entries: list[Entry] = field(default_factory=list)
    told: int | None = None
    error: str = ""
    ended: float | None = None

    def longest_gap(self, since: float, until: float) -> float:
        """Seconds of its longest silence between two tokens that falls into a time, or 0."""
        times = [entry.at for entry in self.entries]
        pairs = itertools.pairwise(times)
        return max((after - before for before, after in pairs if after > since and before < until), default=0.0)


@dataclass(frozen=True)
class Damage:
    """Something wrong: what, when, how many tokens (or streams), and a sentence."""

    kind: Kind
    at: float
    count: int
    sentence: str


class Verdict(BaseModel):
    """The sums over all streams.

    Attributes:
        finished: streams that ended with the right number. Others ran when the clients stopped, or are lost.
        compared, changed: finished or running streams that were compared with an undisturbed one of the same prompt;
            those of them with another token. None if nothing was compared.
    """

    streams: int
    finished: int
    tokens: int
    streams_lost: int
    tokens_lost: int
    tokens_repeated: int
    tokens_out_of_order: int
    wrong_ends: int
    compared: int | None = None
    changed: int | None = None

    @property
    def whole(self) -> bool:
        """Nothing is lost, repeated or out of order. Changed tokens are not counted: see docs/failures.md."""
        wrong = self.streams_lost + self.tokens_lost + self.tokens_repeated + self.tokens_out_of_order
        return wrong + self.wrong_ends == 0

    def __add__(self, other: Verdict) -> Verdict:
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in Verdict.model_fields)
        sums = {name: None if a is b is None else (a or 0) + (b or 0) for name, a, b in pairs}
        return Verdict.model_validate(sums)


def check(histories: Sequence[History], undisturbed: Mapping[str, Sequence[int]] | None = None) -> list[Damage]:
    """Everything that is wrong with the histories.

    Args:
        undisturbed: first token ids of an undisturbed stream, by prompt, where equality is defined. Tokens beyond them
            are not compared.
    """
    return [damage for history in histories for damage in _damages(history, undisturbed or {})]


def verdict(histories: Sequence[History], undisturbed: Mapping[str, Sequence[int]] | None = None) -> Verdict:
    """The sums of `check`."""
    found = check(histories, undisturbed)

    def count(kind: Kind) -> int:
        return sum(damage.count for damage in found if damage.kind == kind)

    return Verdict(
        streams=len(histories),
        finished=sum(history.told is not None and not history.error for history in histories) - count("wrong end"),
        tokens=sum(len(history.entries) for history in histories),
        streams_lost=count("stream lost"),
        tokens_lost=count("token lost"),
        tokens_repeated=count("token repeated"),
        tokens_out_of_order=count("out of order"),
        wrong_ends=count("wrong end"),
        compared=sum(h.prompt in undisturbed for h in histories) if undisturbed else None,
        changed=count("token changed") if undisturbed else None,
    )


def _damages(history: History, undisturbed: Mapping[str, Sequence[int]]) -> Iterator[Damage]:
    yield from _order(history)
    yield from _end(history)
    expected = undisturbed.get(history.prompt, ())
    for entry in history.entries:
        if entry.index < len(expected) and entry.token_id != expected[entry.index]:
            sentence = f"{history.name}: token {entry.index} is {entry.token_id}, undisturbed {expected[entry.index]}"
            yield Damage("token changed", entry.at, 1, sentence)
            break  # those after it follow from it


def _order(history: History) -> Iterator[Damage]:
    """Indices that were skipped, came twice, or came after a later one."""
    seen: set[int] = set()
    skipped: dict[int, float] = {}
    expected = 0
    for entry in history.entries:
        where = f"{history.name}: token {entry.index}"
        if entry.index in seen:
            yield Damage("token repeated", entry.at, 1, f"{where} came twice")
        elif entry.index < expected:
            skipped.pop(entry.index, None)
            yield Damage("out of order", entry.at, 1, f"{where} came after token {expected - 1}")
        else:
            skipped |= dict.fromkeys(range(expected, entry.index), entry.at)
            expected = entry.index + 1
        seen.add(entry.index)
    if history.told is not None and history.ended is not None:
        skipped |= dict.fromkeys(range(expected, min(history.told, history.asked)), history.ended)
    for index, at in skipped.items():
        yield Damage("token lost", at, 1, f"{history.name}: token {index} never came")


def _end(history: History) -> Iterator[Damage]:
    if history.ended is None:
        return
    heard = len({entry.index for entry in history.entries})
    if history.told is None or history.error:
        reason = history.error or "it ended without its last message"
        yield Damage("stream lost", history.ended, 1, f"{history.name} broke after {heard} tokens: {reason}")
    elif not history.told == history.asked == heard:
        sentence = f"{history.name} ended after {heard} tokens and says {history.told}; {history.asked} were asked for"
        yield Damage("wrong end", history.ended, 1, sentence)
