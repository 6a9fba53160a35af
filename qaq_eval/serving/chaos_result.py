"""What was broken, how often, and what the clients lost by it."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Mapping, Sequence

from pydantic import BaseModel
from rich.table import Table

from qaq_eval.serving.chaos import Broken, Chaos, Fault
from qaq_eval.serving.history import Damage, Kind, Verdict, check, verdict
from qaq_eval.serving.listeners import Listener

SENTENCES = 20


class FaultRow(BaseModel):
    """All faults of one kind.

    Attributes:
        streams_lost, tokens_lost, tokens_repeated: what showed after such a fault and before the next one.
        gaps_seconds: of each fault the longest silence of a stream until the stack was whole again.
    """

    role: str
    how: str
    times: int
    streams_lost: int
    tokens_lost: int
    tokens_repeated: int
    gap_median_seconds: float
    gap_worst_seconds: float
    gaps_seconds: list[float]


class ChaosResult(BaseModel):
    """The object of `--json`, see qaq_eval/schemas/bench_chaos.json.

    Attributes:
        refused: streams that could not begin while something was broken, and were asked for again.
        not_whole: why the stack did not recover; None if it did each time.
        damages: the first sentences about what is wrong.
    """

    clients: int
    stream_tokens: int
    preset: str
    workers: int
    routers: int
    seconds: float
    faults: list[FaultRow]
    verdict: Verdict
    refused: int
    not_whole: str | None
    damages: list[str]

    @property
    def whole(self) -> bool:
        """Nothing was lost, and the stack recovered from everything."""
        return self.verdict.whole and self.not_whole is None

    def times(self, fault: Fault) -> int:
        """How often a fault was made."""
        return sum(row.times for row in self.faults if (row.role, row.how) == (fault.role, fault.how))

    def __add__(self, other: ChaosResult) -> ChaosResult:
        """Both runs as one; `other` is the later one."""
        return other.model_copy(
            update={
                "seconds": self.seconds + other.seconds,
                "faults": _merged([*self.faults, *other.faults]),
                "verdict": self.verdict + other.verdict,
                "refused": self.refused + other.refused,
                "not_whole": self.not_whole or other.not_whole,
                "damages": [*self.damages, *other.damages][:SENTENCES],
            }
        )


def rows(chaos: Chaos, damages: Sequence[Damage]) -> list[FaultRow]:
    """A row for each kind of fault, in the order in which they were first made."""
    begins = [broken.began for broken in chaos.broken]
    after = [bisect.bisect_right(begins, damage.at) - 1 for damage in damages]
    damaged = [[damage for damage, last in zip(damages, after, strict=True) if last == at] for at in range(len(begins))]
    return _merged([_row(chaos, broken, found) for broken, found in zip(chaos.broken, damaged, strict=True)])


def outcome(
    chaos: Chaos,
    listeners: Sequence[Listener],
    undisturbed: Mapping[str, Sequence[int]],
    facts: Mapping[str, object],
) -> ChaosResult:
    """The result of a run; `facts` are the fields that say what ran."""
    histories = [history for listener in listeners for history in listener.histories]
    damages = [damage for damage in check(histories) if damage.kind != "token changed"]
    return ChaosResult.model_validate(
        {
            **facts,
            "clients": len(listeners),
            "faults": rows(chaos, damages),
            "verdict": verdict(histories, undisturbed or None),
            "refused": sum(listener.refused for listener in listeners),
            "damages": [damage.sentence for damage in damages[:SENTENCES]],
        }
    )


def table(result: ChaosResult) -> Table:
    """The result for a terminal."""
    shown = Table(title="What was broken", title_justify="left")
    for column in ("what", "times", "streams lost", "tokens lost", "tokens repeated", "median gap", "worst gap"):
        shown.add_column(column, justify="left" if column == "what" else "right", no_wrap=column == "what")
    for row in result.faults:
        lost = (str(count) for count in (row.times, row.streams_lost, row.tokens_lost, row.tokens_repeated))
        shown.add_row(
            f"{row.role} {row.how}", *lost, f"{row.gap_median_seconds:.1f} s", f"{row.gap_worst_seconds:.1f} s"
        )
    return shown


def sentence(result: ChaosResult) -> str:
    """The verdict in words."""
    found = result.verdict
    wrong = {
        "streams lost": found.streams_lost,
        "tokens lost": found.tokens_lost,
        "tokens repeated": found.tokens_repeated,
        "tokens out of order": found.tokens_out_of_order,
        "streams with a wrong end": found.wrong_ends,
    }
    said = ", ".join(f"{count:,} {name}" for name, count in wrong.items() if count) or "nothing lost or repeated"
    compared = "" if found.compared is None else f"; {found.changed} of {found.compared} differ from an undisturbed one"
    heard = f"{found.tokens:,} tokens of {found.streams:,} streams in {result.seconds:.0f} s"
    unrecovered = f"; {result.not_whole}" if result.not_whole else ""
    return f"{heard}: {said}{compared}{unrecovered}"


def _row(chaos: Chaos, broken: Broken, damages: Sequence[Damage]) -> FaultRow:
    def count(kind: Kind) -> int:
        return sum(damage.count for damage in damages if damage.kind == kind)

    gap = chaos.gap(broken)
    return FaultRow(
        role=broken.fault.role,
        how=broken.fault.how,
        times=1,
        streams_lost=count("stream lost"),
        tokens_lost=count("token lost"),
        tokens_repeated=count("token repeated"),
        gap_median_seconds=gap,
        gap_worst_seconds=gap,
        gaps_seconds=[gap],
    )


def _merged(rows: Sequence[FaultRow]) -> list[FaultRow]:
    """One row for each kind of fault."""
    kinds: dict[tuple[str, str], list[FaultRow]] = {}
    for row in rows:
        kinds.setdefault((row.role, row.how), []).append(row)
    return [_sum(same) for same in kinds.values()]


def _sum(same: Sequence[FaultRow]) -> FaultRow:
    gaps = [round(gap, 3) for row in same for gap in row.gaps_seconds]
    return FaultRow(
        role=same[0].role,
        how=same[0].how,
        times=len(gaps),
        streams_lost=sum(row.streams_lost for row in same),
        tokens_lost=sum(row.tokens_lost for row in same),
        tokens_repeated=sum(row.tokens_repeated for row in same),
        gap_median_seconds=statistics.median(gaps),
        gap_worst_seconds=max(gaps),
        gaps_seconds=gaps,
    )
