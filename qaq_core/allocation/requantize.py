"""Attention-window exceptions: vectors whose need has risen above (or fallen below) the bits they hold.

Down is local: bit planes are dropped. Up needs the original: the missing planes are asked for and applied
when they arrive, between decode steps (arXiv 2403.04643, section 4.2).
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from qaq_core.allocation.allocator import Allocator, TokenState, WidthChanges
from qaq_core.base.errors import OriginalsError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.rows import RowReply, RowRequest
from qaq_core.base.widths import HALF
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.staging import Staging

RETRY_AFTER_REVIEWS = 16
"""Looks without a request after an answer that failed or lacked originals."""

FEW = 1 / 64
"""Share of vectors that may lack bits when those that a price had taken are back."""

_NOWHERE = 1 << 62


@dataclass
class RequantizeCounts:
    """What exceptions have done to one sequence."""

    exceptions: int = 0
    rows_requantized: int = 0
    requantize_bytes: int = 0
    rows_narrowed: int = 0
    originals_missing: int = 0
    requests_failed: int = 0


@dataclass(frozen=True)
class _Asked:
    """A request under way: what it asks, the widths its rows had, and the parts of the answer."""

    request: RowRequest
    held: np.ndarray
    parts: list[tuple[np.ndarray, Future[RowReply]]]


class Requantizer:
    """Looks at one sequence's packed tokens and moves vectors to the widths they need.

    Args:
        wait: wait for the answer, as the paper does; otherwise decode goes on with the old bits.
    """

    def __init__(self, packed: PackedTokens, staging: Staging, allocator: Allocator, wait: bool = False) -> None:
        self.packed, self.staging, self.allocator, self.wait = packed, staging, allocator, wait
        self.counts = RequantizeCounts()
        self.rounded_from = _NOWHERE
        """From this position on, rows were packed from rounded numbers, and are asked for anew, all planes."""
        self._asked: _Asked | None = None
        self._patience = 0

    @property
    def pending(self) -> bool:
        return self._asked is not None

    def narrow_to(self, kept: TokenState, lam: float) -> None:
        """Narrows every vector to what it wants at that price, at once."""
        wanted = self.allocator.widths(self.allocator.demand(kept), lam)
        self.counts.rows_narrowed += self.packed.narrow(wanted)

    def review(self, kept: TokenState, lam: float, narrow: bool = True, most_bytes: int | None = None) -> int | None:
        """Narrows what needs less and asks for what needs more. One request is under way at a time.

        Args:
            most_bytes: ask for all that is wanted, without slack, but for no more bytes than this: first for the
                vectors that are looked at most.
        Returns:
            bytes asked for with `most_bytes`; None if few vectors lacked anything, as at any time.
        """
        may_ask = self._asked is None and not self._patience
        self._patience = max(0, self._patience - 1)
        if not (narrow or may_ask):
            return 0
        policy, demand = self.allocator.policy, self.allocator.demand(kept)
        if narrow:
            self._narrow(self.allocator.width_changes(demand, self.packed.tags, lam, policy.hysteresis, None))
        if not may_ask:
            return 0
        slack, rise = (policy.hysteresis, policy.rise) if most_bytes is None else (1.0, 1.0)
        width_changes = self.allocator.width_changes(demand, self.packed.tags, lam / rise, None, 1 / (slack * rise))
        keys, values = (mine.rising for mine in width_changes)
        if most_bytes is not None:
            return self._ask_hottest((keys, values), kept, most_bytes)
        self._ask((keys, values))
        return None

    def _ask_hottest(self, rising: tuple[WidthChanges, WidthChanges], kept: TokenState, most_bytes: int) -> int | None:
        """Asks for as many of the vectors as fit, those of the largest importance first."""
        lacks = sum(map(len, rising))
        seen = self.allocator.view(kept).importance[:, :, kept.first : kept.first + kept.shape[2]].reshape(-1)
        heat = torch.cat([seen[mine.index] for mine in rising])
        size = torch.cat([mine.want.long() - mine.held for mine in rising]) * self.packed.head_dim // 16
        order = heat.argsort(descending=True)
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order[size[order].cumsum(0) <= most_bytes]] = True
        keys, values = chosen.split([len(mine) for mine in rising])
        self._ask((rising[KEY].where(keys), rising[VALUE].where(values)))
        return int(size[chosen].sum()) if lacks > 2 * self.packed.tags.numel() * FEW else None

    def _narrow(self, width_changes: tuple[WidthChanges, WidthChanges]) -> None:
        """Takes vectors that hold more than the most they could need down to what they want."""
        for side, mine in zip((KEY, VALUE), width_changes, strict=True):
            falling = mine.falling
            if len(falling):
                nothing = torch.empty(0, dtype=torch.uint8, device=falling.index.device)
                self.packed.change(side, falling.index, falling.want, nothing, torch.zeros_like(falling.index))
                self.counts.rows_narrowed += len(falling)

    def _ask(self, rising: tuple[WidthChanges, WidthChanges]) -> None:
        rows = sum(map(len, rising))
        if rows == 0:
            return
        self.counts.exceptions += rows
        index, have, want = (
            np.concatenate([getattr(mine, name).cpu().numpy() for mine in rising]) for name in ("index", "held", "want")
        )
        side = np.repeat(np.array([KEY, VALUE], np.uint8), [len(mine) for mine in rising])
        meta = np.concatenate([self._metas(side, mine.index) for side, mine in enumerate(rising)])
        layer, head, token = np.unravel_index(index, self.packed.tags.shape)
        position = token + self.packed.start
        asked = np.where(position >= self.rounded_from, 0, have).astype(np.uint8)  # 0: the whole row, anew
        shape = self.staging.shape
        request = RowRequest(
            shape=shape,
            page_ids=(),
            page=(position // shape.tokens).astype(np.int32),
            layer=layer.astype(np.int16),
            head=head.astype(np.int16),
            token=(position % shape.tokens).astype(np.int16),
            side=side,
            position=position.astype(np.int32),
            have=asked,
            want=want,
            meta=meta,
        )
        # Flat indices move when tokens are appended; (layer, head, position) do not.
        self._asked = _Asked(request, have, self.staging.requantize(request, self.packed.quantizer))
        self.apply()

    def _metas(self, side: int, index: torch.Tensor) -> np.ndarray:
        meta = self.packed.sides[side].meta
        full = meta.expand(*self.packed.tags.shape, meta.shape[-1])
        layer, head, token = np.unravel_index(index.cpu().numpy(), self.packed.tags.shape)
        picked: np.ndarray = (
            full[torch.from_numpy(layer), torch.from_numpy(head), torch.from_numpy(token)].cpu().numpy()
        )
        return picked

    def apply(self) -> None:
        """Applies the answer if it is there (or waits for it); a failed part is counted, rows keep bits."""
        if self._asked is None or not (self.wait or all(part.done() for _, part in self._asked.parts)):
            return
        asked, self._asked = self._asked, None
        for index, future in asked.parts:
            try:
                reply = future.result()
            except OriginalsError:
                self.counts.requests_failed += 1
                self._patience = RETRY_AFTER_REVIEWS
                continue
            self._widen(asked.request.select(index), asked.held[index], reply)

    def _widen(self, request: RowRequest, held: np.ndarray, reply: RowReply) -> None:
        missing = int((~reply.found).sum())
        if missing:
            self.counts.originals_missing += missing
            self._patience = RETRY_AFTER_REVIEWS
        held = held[reply.found]
        found = request.select(reply.found)
        sizes = found.payload_bytes()
        ends = np.cumsum(sizes)
        planes = torch.from_numpy(reply.planes).to(self.packed.device)
        flat = np.ravel_multi_index(
            (
                found.layer.astype(np.int64),
                found.head.astype(np.int64),
                found.position.astype(np.int64) - self.packed.start,
            ),
            self.packed.tags.shape,
        )
        for side in (KEY, VALUE):
            mine = np.flatnonzero(found.side == side)
            mine = mine[np.argsort(flat[mine], kind="stable")]
            index = torch.from_numpy(flat[mine]).to(self.packed.device)
            # A vector that was narrowed while its planes were under way no longer fits them.
            still = self.packed.widths(side).reshape(-1)[index].cpu().numpy() == held[mine]
            mine, index = mine[still], index[torch.from_numpy(still).to(index.device)]
            if not len(mine):
                continue
            starts = torch.from_numpy(ends[mine] - sizes[mine]).to(self.packed.device)
            want, keep = (torch.from_numpy(part[mine]).to(index.device) for part in (found.want, found.have))
            keep = torch.where(want == HALF, 0, keep)
            self.packed.change(side, index, want, planes, starts, keep)
            self.counts.rows_requantized += len(mine)
            self.counts.requantize_bytes += int(sizes[mine].sum())

    def close(self, nothing: PackedTokens) -> None:
        """Lets go of the packed tokens and of what was asked for; the counts stay."""
        self.packed, self._asked = nothing, None
