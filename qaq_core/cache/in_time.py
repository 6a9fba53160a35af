"""Exceptions in time: what a step looks at and that holds too little is exchanged before the layer ends.

In every layer of a decode step the squared probabilities of that very step say what the packed rows' errors cost it
(`StepErrors`). The originals of the tokens that cost most are fetched, and the layer's attention is corrected for them
(`attention.correct`). Nothing that is held changes: a draft's queries are corrected as those of decode. What is fetched
and waited for in one step is bounded.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from qaq_core.allocation import Found, Importance, StepError, StepErrors
from qaq_core.allocation.requantize import RequantizeCounts, Requantizer
from qaq_core.attention import BetterRows, ReferenceAttention, correct
from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.rows import ROW_ARRAYS, RowReply, RowRequest
from qaq_core.storage.packed import PackedTokens

log = logging.getLogger(__name__)

Place = tuple[int, int, int]
"""Layer, KV head and position of a token's key and value."""


@dataclass(frozen=True)
class InTimeLimits:
    """Bounds of what one step of one sequence may do.

    Attributes:
        least_error: nats that a token's rows must cost a step in one layer to be fetched.
        most_bytes: bytes of rows fetched.
        most_seconds: waited for a store.
        width: of a row that is fetched, in half bits an element, see `base.widths`.
        pause: steps without a fetch after one that failed, came too late, or found no original.
        kept_bytes: host memory for rows that were fetched, which later steps often look at again.
    """

    least_error: float = 1e-4
    most_bytes: int = 6 << 10
    most_seconds: float = 0.05
    width: int = 16
    pause: int = 64
    kept_bytes: int = 4 << 20


class InTime:
    """Corrects the decode steps of one sequence.

    Args:
        errors: the method's.
        rows: dequantizes single rows.
        requantizer: the sequence's, whose packed tokens, store and counts these are.
    """

    def __init__(
        self,
        errors: StepErrors,
        rows: ReferenceAttention,
        limits: InTimeLimits,
        requantizer: Requantizer,
    ) -> None:
        self._errors, self._rows, self.limits = errors, rows, limits
        self._requantizer = requantizer
        self._ended: list[float] = []
        self._factors: torch.Tensor | None = None
        self._steps: dict[int, _Step | None] = {}
        self._kept: OrderedDict[Place, torch.Tensor] = OrderedDict()
        self._held: dict[Place, torch.Tensor] = {}
        self._held_version = 0
        self._paused_until = 0

    @property
    def packed(self) -> PackedTokens:
        return self._requantizer.packed

    @property
    def counts(self) -> RequantizeCounts:
        return self._requantizer.counts

    def fork(self, requantizer: Requantizer) -> InTime:
        """The same for a copy of the sequence, between two passes."""
        other = InTime(self._errors, self._rows, self.limits, requantizer)
        other._factors = self._factors
        return other

    def begin(self, importance: Importance, sinks: int, length: int, renew: bool) -> None:
        """A pass of decode steps begins, whose queries `importance` observes.

        Args:
            length: of the sequence before it.
            renew: the statistic has changed, so that errors are measured by it anew.
        """
        self.forget()
        if not len(self.packed):
            self._factors, self._steps = None, dict.fromkeys(importance.observed)
            return
        if renew or self._factors is None:
            self._factors = self._errors.factors(importance.view(length), sinks)
        for position, observed in importance.observed.items():
            error = self._errors.step(self.packed, observed, self._factors)
            self._steps[position] = _Step(error, self.limits.most_bytes, self.limits.most_seconds)

    def correct(
        self, position: int, layer: int, query: torch.Tensor, scaling: float, log_sums: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Corrects a layer of the query at a position, whose attention has just been computed.

        Args:
            query: [query_heads, head_dim]. log_sums: float32 [query_heads].
            out: float32 [query_heads, head_dim]; changed in place.
        """
        step = self._steps.get(position)
        if step is None or (found := step.error.look(layer, self.limits.least_error)) is None:
            return
        row_bytes = 2 * self.limits.width * self.packed.head_dim // 16
        found = found.largest(step.bytes_left // row_bytes)
        if not len(found) or position < self._paused_until:
            return
        better = self._fetch(step, position, layer, found)
        if better is None:
            return
        found, rows = better
        step.bytes_left -= len(found) * row_bytes
        step.corrected += float(found.error.sum(dtype=torch.float64))
        self.counts.rows_corrected += 2 * len(found)
        self.counts.requantize_bytes += len(found) * row_bytes
        held = self._held_rows(layer, found)
        exchanged = BetterRows(found.head, found.token + self.packed.start, held, rows)
        transform = self.packed.quantizer.transform
        correct(out, query.float() * scaling, log_sums, layer, transform, exchanged, self.packed.heads)

    def end(self, position: int) -> None:
        """The query at a position counts."""
        if position in self._steps:
            self._ended.append(_error(self._steps.pop(position)))

    @property
    def predicted(self) -> list[float]:
        """The predicted errors, in nats, of the last pass's queries, if they were decode steps. Refused ones are not
        among them once their draft has ended."""
        return [*self._ended, *map(_error, self._steps.values())]

    def forget(self, refused: bool = False) -> None:
        """Forgets the last pass; with `refused` those of its queries that have not ended."""
        self._steps = {}
        if not refused:
            self._ended = []

    def renew(self) -> None:
        """The statistic has changed as a whole: the next pass measures errors by it anew."""
        self._factors = None

    def crop(self, stop: int) -> None:
        """The tokens from position `stop` on are packed no more."""
        self.renew()
        for place in [place for place in self._kept if place[2] >= stop]:
            del self._kept[place]

    def close(self) -> None:
        """Releases what was kept of originals."""
        self.renew()
        self.forget()
        self._kept.clear()
        self._held.clear()

    def _places(self, layer: int, found: Found) -> list[Place]:
        start = self.packed.start
        pairs = zip(found.head.tolist(), found.token.tolist(), strict=True)
        return [(layer, head, token + start) for head, token in pairs]

    def _held_rows(self, layer: int, found: Found) -> torch.Tensor:
        """The tokens' rows as they are held: float32 [2, n, head_dim]. Until some change they are dequantized once."""
        if self._held_version != self.packed.version:
            self._held, self._held_version = {}, self.packed.version
        places = self._places(layer, found)
        new = [i for i, place in enumerate(places) if place not in self._held]
        if new:
            some = found.of(torch.tensor(new))
            sides = [self._rows.rows_at(self.packed, side, layer, some.head, some.token) for side in (KEY, VALUE)]
            for i, rows in zip(new, torch.stack(sides, 1), strict=True):
                self._held[places[i]] = rows
        return torch.stack([self._held[place] for place in places], 1)

    # -- originals -------------------------------------------------------------------------------------

    def _fetch(self, step: _Step, position: int, layer: int, found: Found) -> tuple[Found, torch.Tensor] | None:
        """Those of the tokens whose originals are there in time, and their rows float32 [2, n, head_dim]."""
        places = self._places(layer, found)
        missing = [i for i, place in enumerate(places) if place not in self._kept]
        if missing:
            self._ask(step, position, layer, found.of(torch.tensor(missing)))
        here = [i for i, place in enumerate(places) if place in self._kept]
        rows = [self._kept[places[i]] for i in here]
        for i in here:
            self._kept.move_to_end(places[i])
        most = self.limits.kept_bytes // (2 * 4 * self.packed.head_dim)
        while len(self._kept) > most:
            self._kept.popitem(last=False)
        if not rows:
            return None
        if len(here) < len(places):
            found = found.of(torch.tensor(here))
        return found, torch.stack(rows, 1)

    def _ask(self, step: _Step, position: int, layer: int, found: Found) -> None:
        """Asks for the keys and values of tokens, and keeps what comes in time."""
        packed, n = self.packed, len(found)
        head = found.head.repeat(2)
        at = found.token.repeat(2) + packed.start
        where = torch.full((n,), layer)
        meta = torch.cat([packed.meta_at(side, where, head[:n], at[:n]) for side in (KEY, VALUE)])
        rows: dict[str, int | torch.Tensor] = {
            "layer": layer,
            "head": head,
            "position": at,
            "have": 0,
            "want": self.limits.width,
            "side": 0,
        }
        arrays = {
            name: np.full(2 * n, part, ROW_ARRAYS[name])
            if isinstance(part, int)
            else part.cpu().numpy().astype(ROW_ARRAYS[name])
            for name, part in rows.items()
        }
        arrays["side"][n:] = VALUE
        staging = self._requantizer.staging
        page_ids = staging.page_ids(arrays["position"])
        request = RowRequest(staging.shape, page_ids, meta=meta.cpu().numpy(), **arrays)
        scale = packed.quantizer.spread(packed.quantizer.codec.affine(meta)[0], packed.head_dim)
        got = torch.full((2, n, packed.head_dim), float("nan"), device=packed.device)
        for index, future in staging.requantize(request, packed.quantizer):
            reply = self._wait(step, position, future, len(index))
            if reply is None:
                continue
            there = torch.from_numpy(index[reply.found])
            planes = torch.from_numpy(reply.planes).view(len(there), self.limits.width * packed.head_dim // 16)
            for side in (KEY, VALUE):
                mine = there.div(n, rounding_mode="floor") == side
                levels = self._rows.levels(packed, side, planes[mine].to(packed.device), self.limits.width)
                got[side, there[mine] - side * n] = levels * scale[there[mine]]
            if len(there) < len(index):
                self.counts.originals_missing += len(index) - len(there)
                self._pause(position)
        whole = got.isfinite().all(-1).all(0).tolist()
        for i, place in enumerate(self._places(layer, found)):
            if whole[i]:
                self._kept[place] = got[:, i].clone()

    def _wait(self, step: _Step, position: int, future: Future[RowReply], rows: int) -> RowReply | None:
        """The reply, if it comes within what is left of the step's time."""
        begun = time.monotonic()
        try:
            return future.result(None if self._requantizer.wait else max(0.0, step.seconds_left))
        except TimeoutError:
            self.counts.corrections_late += rows
            _warn_late(self.limits.most_seconds)
        except OriginalsError:
            self.counts.requests_failed += 1
        finally:
            step.seconds_left -= time.monotonic() - begun
        self._pause(position)
        return None

    def _pause(self, position: int) -> None:
        self._paused_until = max(self._paused_until, position + 1 + self.limits.pause)


@dataclass
class _Step:
    """What one step may still do, in bytes and seconds, and the error in nats that was corrected."""

    error: StepError
    bytes_left: int
    seconds_left: float
    corrected: float = 0.0


def _error(step: _Step | None) -> float:
    """What is left of a step's error in nats."""
    return 0.0 if step is None else max(0.0, step.error.total - step.corrected)


@cache
def _warn_late(seconds: float) -> None:
    """Once a process: the counter has the rest."""
    log.warning(
        "originals did not come within %g s of a decode step: steps go on without, and none asks for a while", seconds
    )
