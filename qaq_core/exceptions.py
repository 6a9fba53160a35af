"""Attention-window exceptions: vectors whose need has risen above (or fallen below) the bits they hold.

Down is local: bit planes are dropped. Up needs the original: the missing planes are asked for and applied
when they arrive, between decode steps (arXiv 2403.04643, section 4.2).
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from qaq_core.errors import OriginalsError
from qaq_core.originals import RowReply, RowRequest
from qaq_core.packed import PackedTokens
from qaq_core.packing import HALF
from qaq_core.pages import KEY, VALUE
from qaq_core.policies import Policy, View
from qaq_core.staging import Staging

PATIENCE = 16
"""Looks without a request after an answer that failed or lacked originals."""

FEW = 1 / 64
"""Share of vectors that may lack bits when those that a price had taken are back."""

_NOWHERE = 1 << 62


@dataclass
class Counts:
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


class Exceptions:
    """Looks at one sequence's packed tokens and moves vectors to the widths they need.

    Args:
        wait: wait for the answer, as the paper does; otherwise decode goes on with the old bits.
    """

    def __init__(self, packed: PackedTokens, staging: Staging, policy: Policy, wait: bool = False) -> None:
        self.packed, self.staging, self.policy, self.wait = packed, staging, policy, wait
        self.counts = Counts()
        self.rounded_from = _NOWHERE
        """From this position on, rows were packed from rounded numbers, and are asked for anew, all planes."""
        self._asked: _Asked | None = None
        self._patience = 0

    @property
    def pending(self) -> bool:
        return self._asked is not None

    def settle(self, view: View, price: float) -> None:
        """Narrows every vector to what it wants at that price, at once."""
        want = self.policy.widths(self.policy.demand(view), price)
        for side in (KEY, VALUE):
            self._narrow(side, want[side], want[side])

    def review(self, view: View, price: float, narrow: bool = True, most_bytes: int | None = None) -> int | None:
        """Narrows what needs less and asks for what needs more. One request is under way at a time.

        Args:
            most_bytes: ask for all that is wanted, without slack, but for no more bytes than this: first for the
                vectors that are looked at most.
        Returns:
            bytes asked for with `most_bytes`; None if few vectors lacked anything, as at any time.
        """
        demand, slack = self.policy.demand(view), self.policy.hysteresis
        want = self.policy.widths(demand, price)
        if narrow:
            high = want if slack == 1.0 else self.policy.widths(demand, price, need=slack)
            for side in (KEY, VALUE):
                self._narrow(side, high[side], want[side])
        if self._patience:
            self._patience -= 1
        elif self._asked is None:
            strict = slack == 1.0 or most_bytes is not None
            low = want if strict else self.policy.widths(demand, price, need=1 / slack)
            held = (self.packed.widths(KEY), self.packed.widths(VALUE))
            rising: list[tuple[int, torch.Tensor, torch.Tensor]] = []
            for side in (KEY, VALUE):
                up = torch.nonzero((low[side] > held[side]).reshape(-1)).squeeze(1)
                rising.append((side, up, want[side].reshape(-1)[up]))
            if most_bytes is None:
                self._ask(rising, held)
                return None
            return self._ask_hottest(rising, held, view, most_bytes)
        return 0

    def _ask_hottest(
        self,
        rising: list[tuple[int, torch.Tensor, torch.Tensor]],
        held: tuple[torch.Tensor, torch.Tensor],
        view: View,
        most_bytes: int,
    ) -> int | None:
        """Asks for as many of the vectors as fit, those of the largest importance first."""
        lacks = sum(len(index) for _, index, _ in rising)
        seen = view.importance[:, :, view.first : view.first + view.shape[2]].reshape(-1)
        heat = torch.cat([seen[index] for _, index, _ in rising])
        lacking = [width.long() - held[side].reshape(-1)[index] for side, index, width in rising]
        size = torch.cat(lacking) * self.packed.head_dim // 16
        order = heat.argsort(descending=True)
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order[size[order].cumsum(0) <= most_bytes]] = True
        parts = chosen.split([len(index) for _, index, _ in rising])
        self._ask(
            [(side, index[own], width[own]) for (side, index, width), own in zip(rising, parts, strict=True)], held
        )
        return int(size[chosen].sum()) if lacks > 2 * self.packed.tags.numel() * FEW else None

    def _narrow(self, side: int, most: torch.Tensor, want: torch.Tensor) -> None:
        """Takes vectors that hold more than the most they could need down to what they want."""
        index = torch.nonzero((most < self.packed.widths(side)).reshape(-1)).squeeze(1)
        if len(index):
            nothing = torch.empty(0, dtype=torch.uint8, device=index.device)
            self.packed.change(side, index, want.reshape(-1)[index], nothing, torch.zeros_like(index))
            self.counts.rows_narrowed += len(index)

    def _ask(
        self, rising: list[tuple[int, torch.Tensor, torch.Tensor]], held: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        rows = sum(len(index) for _, index, _ in rising)
        if rows == 0:
            return
        self.counts.exceptions += rows
        index = np.concatenate([index.cpu().numpy() for _, index, _ in rising])
        side = np.concatenate([np.full(len(index), side, np.uint8) for side, index, _ in rising])
        have = np.concatenate([held[side].reshape(-1)[index].cpu().numpy() for side, index, _ in rising])
        want = np.concatenate([width.cpu().numpy() for _, _, width in rising])
        meta = np.concatenate([self._metas(side, index) for side, index, _ in rising])
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
                self._patience = PATIENCE
                continue
            self._widen(asked.request.select(index), asked.held[index], reply)

    def _widen(self, request: RowRequest, held: np.ndarray, reply: RowReply) -> None:
        missing = int((~reply.found).sum())
        if missing:
            self.counts.originals_missing += missing
            self._patience = PATIENCE
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
