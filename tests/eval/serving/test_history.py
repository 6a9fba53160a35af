"""The checker finds every damage to a history, and none in a whole one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qaq_eval.serving.history import Entry, History, Verdict, check, verdict

ASKED = 20
UNDISTURBED = {"p": [100 + index for index in range(ASKED)]}


def history(**changed: object) -> History:
    """A whole one: a token a second."""
    entries = [Entry(index, 100 + index, float(index)) for index in range(ASKED)]
    return replace(History("s", "p", ASKED, entries, told=ASKED, ended=30.0), **changed)  # type: ignore[arg-type]


def damaged(change: Callable[[list[Entry]], object]) -> History:
    heard = history()
    change(heard.entries)
    return heard


def test_a_whole_history_has_no_damage() -> None:
    assert check([history(), history()], UNDISTURBED) == []
    assert verdict([history(), history()], UNDISTURBED) == Verdict(
        streams=2,
        finished=2,
        tokens=2 * ASKED,
        streams_lost=0,
        tokens_lost=0,
        tokens_repeated=0,
        tokens_out_of_order=0,
        wrong_ends=0,
        compared=2,
        changed=0,
    )


def test_a_stream_that_runs_is_whole_so_far() -> None:
    heard = history(told=None, ended=None)
    del heard.entries[7:]
    found = verdict([heard])
    assert (found.whole, found.finished, found.changed) == (True, 0, None)


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda entries: entries.pop(0), {"token lost", "wrong end"}),
        (lambda entries: entries.pop(9), {"token lost", "wrong end"}),
        (lambda entries: entries.pop(), {"token lost", "wrong end"}),
        (lambda entries: entries.insert(9, entries[8]), {"token repeated"}),
        (lambda entries: entries.insert(15, entries[8]), {"token repeated"}),
        (lambda entries: entries.append(entries[-1]), {"token repeated"}),
        (lambda entries: entries.insert(4, entries.pop(5)), {"out of order"}),
        (lambda entries: entries.append(entries.pop(0)), {"out of order"}),
        (lambda entries: entries.append(Entry(ASKED, 7, 29.0)), {"wrong end"}),
        (lambda entries: entries.clear(), {"token lost", "wrong end"}),
        (lambda entries: entries.__setitem__(3, Entry(3, 7, 3.0)), {"token changed"}),
    ],
)
def test_what_is_missing_repeated_moved_or_changed_is_found(
    change: Callable[[list[Entry]], object], kinds: set[str]
) -> None:
    heard = damaged(change)
    assert {damage.kind for damage in check([history(), heard], UNDISTURBED)} == kinds
    assert verdict([heard], UNDISTURBED).whole == (kinds == {"token changed"})


def test_tokens_are_counted_one_by_one() -> None:
    heard = damaged(lambda entries: entries.__delitem__(slice(5, 8)))
    heard.entries += heard.entries[:2]
    found = verdict([heard])
    assert (found.tokens_lost, found.tokens_repeated, found.wrong_ends, found.finished) == (3, 2, 1, 0)


@pytest.mark.parametrize(("told", "error"), [(None, "UNAVAILABLE"), (None, ""), (ASKED, "DEADLINE_EXCEEDED")])
def test_a_stream_that_broke_is_lost(told: int | None, error: str) -> None:
    (damage,) = check([history(told=told, error=error)])
    assert (damage.kind, damage.at) == ("stream lost", 30.0)
    assert error in damage.sentence


def test_one_that_tells_another_number_is_wrong() -> None:
    assert {damage.kind for damage in check([history(told=ASKED - 1)])} == {"wrong end"}


def test_damage_has_the_time_at_which_it_showed() -> None:
    (lost, _) = check([damaged(lambda entries: entries.pop(9))])
    assert lost.at == 10.0


def test_the_longest_gap_is_that_which_falls_into_a_time() -> None:
    heard = history()
    heard.entries[10:] = [replace(entry, at=entry.at + 5) for entry in heard.entries[10:]]
    assert heard.longest_gap(9.5, 11.0) == 6.0
    assert heard.longest_gap(0.0, 8.5) == 1.0
    assert heard.longest_gap(40.0, 50.0) == 0.0


def test_verdicts_add_up() -> None:
    one, other = verdict([history()]), verdict([history(error="gone")], UNDISTURBED)
    both = one + other
    assert (both.streams, both.streams_lost, both.tokens, both.compared) == (2, 1, 2 * ASKED, 1)
    assert (one + one).changed is None
