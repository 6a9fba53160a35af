"""Requantization: packed vectors change to the widths that they need now (arXiv 2403.04643, section 4.2).

A vector whose need has risen above, or fallen below, the bits that it holds is an attention-window exception.
Narrowing is local: bit planes are dropped. Widening needs the original: the missing planes are requested, and
applied between decode steps when they have arrived.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch

from qaq_core.allocation.allocator import Allocator, TokenState, WidthChanges
from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.rows import ROW_ARRAYS, RowReply, RowRequest
from qaq_core.base.widths import HALF
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.staging import Staging

RETRY_AFTER_REVIEWS = 16
"""Reviews without a request after a reply that failed or lacked originals."""

RECOVERED_SHARE = 1 / 64
"""Share of vectors that may still lack bits when a sequence has recovered from a floor of λ."""

_NEVER = 1 << 62


@dataclass
class RequantizeCounts:
    """What requantization has done to one sequence: numbers of rows, bytes of planes and requests.

    Attributes:
        rows_corrected: rows fetched for the step that looked at them, see `cache.in_time`; their bytes count too.
        corrections_late: rows that such a step asked for and that did not come in time.
    """

    exceptions: int = 0
    rows_requantized: int = 0
    requantize_bytes: int = 0
    rows_narrowed: int = 0
    originals_missing: int = 0
    requests_failed: int = 0
    rows_corrected: int = 0
    corrections_late: int = 0


class RowLog:
    """How many vectors of each token were asked for, and how many were re-quantized, since the log began."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, 0), dtype=np.int32)

    def ask(self, positions: np.ndarray) -> None:
        """Vectors of the tokens at these positions are requested; a position occurs once for each."""
        self._add(0, positions)

    def answer(self, positions: np.ndarray) -> None:
        """Vectors of the tokens at these positions have been re-quantized."""
        self._add(1, positions)

    def asked(self, first: int, stop: int) -> np.ndarray:
        """int32 [stop - first]."""
        return self._read(0, first, stop)

    def answered(self, first: int, stop: int) -> np.ndarray:
        """int32 [stop - first]."""
        return self._read(1, first, stop)

    def crop(self, stop: int) -> None:
        """The tokens from position `stop` on are others now."""
        self._counts[:, stop:] = 0

    def _add(self, kind: int, positions: np.ndarray) -> None:
        if not len(positions):
            return
        if (room := int(positions.max()) + 1) > self._counts.shape[1]:
            self._counts = np.pad(self._counts, ((0, 0), (0, 2 * room - self._counts.shape[1])))
        np.add.at(self._counts[kind], positions, 1)

    def _read(self, kind: int, first: int, stop: int) -> np.ndarray:
        known = self._counts[kind, first:stop]
        return np.pad(known, (0, stop - first - len(known)))


@dataclass(frozen=True)
class PendingRequest:
    """A request whose reply has not been applied.

    Attributes:
        held: uint8 [n], the width of each row when it was requested.
        parts: row indices and the future reply of each part.
        stop: rows from this position on were cropped, and are others now.
    """

    request: RowRequest
    held: np.ndarray
    parts: list[tuple[np.ndarray, Future[RowReply]]]
    stop: int = _NEVER

    @property
    def done(self) -> bool:
        return all(future.done() for _, future in self.parts)


class Requantizer:
    """Reviews the packed tokens of one sequence and changes vectors to the widths that they need.

    Args:
        wait: wait for the reply, as the paper does; otherwise decoding continues with the old bits.

    Attributes:
        rounded_from: rows from this position on were packed from rounded numbers; all their planes are requested.
        log: of single tokens, once somebody watches, see `cache.view`; None before.
    """

    def __init__(self, packed: PackedTokens, staging: Staging, allocator: Allocator, wait: bool = False) -> None:
        self.packed, self.staging, self.allocator, self.wait = packed, staging, allocator, wait
        self.counts = RequantizeCounts()
        self.rounded_from = _NEVER
        self.log: RowLog | None = None
        self._pending: PendingRequest | None = None
        self._reviews_to_skip = 0

    @property
    def pending(self) -> bool:
        """Whether a request has not been applied yet."""
        return self._pending is not None

    def narrow_to(self, state: TokenState, lam: float) -> None:
        """Narrows every vector at once to the width that it wants at λ = `lam`."""
        wanted = self.allocator.widths(self.allocator.demand(state), lam)
        self.counts.rows_narrowed += self.packed.narrow(wanted)

    def review(self, state: TokenState, lam: float, narrow: bool = True, byte_limit: int | None = None) -> int | None:
        """Narrows vectors that need less and requests planes for those that need more, one request at a time.

        Args:
            narrow: whether vectors may be narrowed in this review.
            byte_limit: request every vector that wants more, without hysteresis, in order of importance, up to this
                many bytes.
        Returns:
            bytes requested under `byte_limit`; None without a limit, or if few vectors lacked bits.
        """
        may_request = self._pending is None and not self._reviews_to_skip
        self._reviews_to_skip = max(0, self._reviews_to_skip - 1)
        if not (narrow or may_request):
            return 0
        policy, demand = self.allocator.policy, self.allocator.demand(state)
        if narrow:
            self._narrow(self.allocator.width_changes(demand, self.packed.tags, lam, policy.hysteresis, None))
        if not may_request:
            return 0
        slack, rise = (policy.hysteresis, policy.rise) if byte_limit is None else (1.0, 1.0)
        changes = self.allocator.width_changes(demand, self.packed.tags, lam / rise, None, 1 / (slack * rise))
        keys, values = (side.rising for side in changes)
        if byte_limit is not None:
            return self._request_most_important((keys, values), state, byte_limit)
        self._request((keys, values))
        return None

    def _narrow(self, changes: tuple[WidthChanges, WidthChanges]) -> None:
        for side in (KEY, VALUE):
            falling = changes[side].falling
            if len(falling):
                no_planes = torch.empty(0, dtype=torch.uint8, device=falling.index.device)
                self.packed.change(side, falling.index, falling.want, no_planes, torch.zeros_like(falling.index))
                self.counts.rows_narrowed += len(falling)

    def _request_most_important(
        self, rising: tuple[WidthChanges, WidthChanges], state: TokenState, byte_limit: int
    ) -> int | None:
        """Requests the vectors of the largest importance that fit in `byte_limit`."""
        everything = self.allocator.view(state).importance
        of_tokens = everything[:, :, state.first : state.first + state.shape[2]].reshape(-1)
        importance = torch.cat([of_tokens[side.index] for side in rising])
        size = torch.cat([side.want.long() - side.held for side in rising]) * self.packed.head_dim // 16
        order = importance.argsort(descending=True)
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order[size[order].cumsum(0) <= byte_limit]] = True
        keys, values = chosen.split([len(side) for side in rising])
        self._request((rising[KEY].where(keys), rising[VALUE].where(values)))
        return int(size[chosen].sum()) if len(chosen) > 2 * self.packed.tags.numel() * RECOVERED_SHARE else None

    def _request(self, rising: tuple[WidthChanges, WidthChanges]) -> None:
        if not any(map(len, rising)):
            return
        request, held = self._make_request(rising)
        self.counts.exceptions += len(request)
        if self.log is not None:
            self.log.ask(request.position)
        self._pending = PendingRequest(request, held, self.staging.requantize(request, self.packed.quantizer))
        self.apply()

    def _make_request(self, rising: tuple[WidthChanges, WidthChanges]) -> tuple[RowRequest, np.ndarray]:
        """The request for the planes that vectors lack, and the widths uint8 [n] that they hold."""
        packed = self.packed
        addresses = [packed.address(side.index) for side in rising]
        meta = torch.cat([packed.meta_at(side, *address) for side, address in enumerate(addresses)])
        layer, head, position = (torch.cat(parts) for parts in zip(*addresses, strict=True))
        held, want = (torch.cat([getattr(side, name) for side in rising]) for name in ("held", "want"))
        rows = {
            "layer": layer,
            "head": head,
            "position": position,
            "side": torch.cat([torch.full_like(part.held, side) for side, part in enumerate(rising)]),
            "have": torch.where(position < self.rounded_from, held, 0),
            "want": want,
        }
        arrays = {name: tensor.cpu().numpy().astype(ROW_ARRAYS[name]) for name, tensor in rows.items()}
        page_ids = self.staging.page_ids(arrays["position"])
        return RowRequest(self.staging.shape, page_ids, meta=meta.cpu().numpy(), **arrays), held.cpu().numpy()

    def apply(self) -> None:
        """Applies the reply if it has arrived, or waits for it. The rows of a part that failed keep their bits."""
        if self._pending is None or not (self.wait or self._pending.done):
            return
        pending, self._pending = self._pending, None
        for index, future in pending.parts:
            try:
                reply = future.result()
            except OriginalsError:
                self.counts.requests_failed += 1
                self._reviews_to_skip = RETRY_AFTER_REVIEWS
                continue
            self._widen(pending.request.select(index), pending.held[index], reply, pending.stop)

    def _widen(self, request: RowRequest, held: np.ndarray, reply: RowReply, stop: int) -> None:
        """Widens the rows before position `stop` whose planes have arrived."""
        packed = self.packed
        missing = len(request) - int(reply.found.sum())
        if missing:
            self.counts.originals_missing += missing
            self._reviews_to_skip = RETRY_AFTER_REVIEWS
        found, held = request.select(reply.found), held[reply.found]
        arrays = (found.layer, found.head, found.position, found.have, found.want, held, found.payload_bytes())
        planes, layer, head, position, have, want, width, size = (
            torch.from_numpy(array).to(packed.device) for array in (reply.planes, *arrays)
        )
        index, start = packed.flat_index(layer, head, position), size.cumsum(0) - size
        keep = torch.where(want == HALF, 0, have)
        for side in (KEY, VALUE):
            rows = torch.from_numpy(np.flatnonzero((found.side == side) & (found.position < stop))).to(packed.device)
            # The planes no longer fit a row that was narrowed while the request was pending.
            rows = rows[packed.widths(side).reshape(-1)[index[rows]] == width[rows]]
            if not len(rows):
                continue
            packed.change(side, index[rows], want[rows], planes, start[rows], keep[rows])
            self.counts.rows_requantized += len(rows)
            self.counts.requantize_bytes += int(size[rows].sum())
            if self.log is not None:
                self.log.answer(position[rows].cpu().numpy())

    def crop(self, stop: int) -> None:
        """The tokens from position `stop` on are packed no more. Those that are packed there later were rounded."""
        if self._pending is not None:
            self._pending = replace(self._pending, stop=min(self._pending.stop, stop))
        if self.rounded_from != _NEVER:
            self.rounded_from = min(self.rounded_from, stop)
        if self.log is not None:
            self.log.crop(stop)

    def close(self, empty: PackedTokens) -> None:
        """Releases the packed tokens (`empty` takes their place) and the pending request; the counts stay."""
        self.packed, self._pending = empty, None
