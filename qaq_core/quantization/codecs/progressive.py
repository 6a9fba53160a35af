"""Progressive codes: the cells of `gaussian`, for rows whose octets differ in the cost of an error.

The transform has sorted the dims of a row by cost. The order of bit planes is greedy: each next plane goes to the octet
where it lowers the expected cost most. That is reverse water-filling over octets, and a prefix of the order is nearly
the best row of its size.

A row has two scales, one for its first quarter and one for the rest, each a 4-bit logarithm, in one meta byte. The
transform makes the scale of a typical row 1; the last few codes cover outlier rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from qaq_core.base.constants import constant_on
from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.quantization.codecs.gaussian import GaussianCodec, cells

LOG2_SCALES = (*(-7 / 3 + i / 3 for i in range(12)), 2.0, 3.5, 6.0, 12.0)


class ProgressiveCodec(GaussianCodec):
    """For rows of a transform that sorts their dims by cost.

    Args:
        orders: for keys and values, the octet of each unit, see `bit_planes.RowLayout`.
    Raises:
        ConfigError: an order does not name each octet eight times.
    """

    name = "progressive"
    meta_bytes = 1

    def __init__(self, orders: Sequence[Sequence[int]]) -> None:
        super().__init__()
        _check_orders(orders)
        self._orders = [torch.tensor(order, dtype=torch.uint8) for order in orders]
        self.split = max(1, len(orders[0]) // 32)
        logs = torch.tensor(LOG2_SCALES, dtype=torch.float64)
        self._table = torch.exp2(logs).float()
        self._borders = torch.exp2((logs[1:] + logs[:-1]) / 2).float()

    @property
    def first_dims(self) -> int:
        """Dims that the first scale is for."""
        return 8 * self.split

    def order(self, side: int, head_dim: int) -> torch.Tensor:
        return self._orders[side]

    def meta_of(self, rms: torch.Tensor) -> torch.Tensor:
        if rms.numel() and float(rms.max()) > float(self._table[-1]):
            layer = int(torch.nonzero(rms > self._table[-1])[0, 0])
            most = float(self._table[-1])
            raise QuantizationError(f"layer {layer}: a row is over {most:.0f} times as large as a typical one")
        borders = constant_on(self._borders, rms.device)
        first, rest = torch.bucketize(rms, borders, out_int32=True).to(torch.uint8).unbind(-1)
        return (first | (rest << 4)).unsqueeze(-1)

    def affine(self, meta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        table, code = constant_on(self._table, meta.device), meta[..., 0].int()
        return table[torch.stack([code & 15, code >> 4], -1)], None

    def settings(self) -> dict[str, object]:
        return {"name": self.name, "orders": [order.tolist() for order in self._orders]}


def _check_orders(orders: Sequence[Sequence[int]]) -> None:
    if len(orders) != 2 or len(orders[0]) != len(orders[1]):
        raise ConfigError("a progressive codec has two orders of one length, of keys and of values")
    units = len(orders[0])
    eight_times = sorted([*range(units // 8)] * 8)
    if not 0 < units <= 8 * 256 or units % 16 or any(sorted(order) != eight_times for order in orders):
        raise ConfigError("each of a progressive codec's orders names every octet of a row eight times")


def greedy_order(costs: torch.Tensor) -> list[int]:
    """The octet of each unit: the next plane goes where it lowers Σ cost · D(planes) most.

    Args:
        costs: [..., octets], relative cost of an error in each octet; heads are averaged in logarithms.
    """
    mean = costs.double().reshape(-1, costs.shape[-1])
    weight = (mean / mean.mean(-1, keepdim=True)).clamp_min(1e-9).log().mean(0).exp().tolist()
    distortions = [cells(bits)[1] for bits in range(9)]
    gains = [before - after for before, after in itertools.pairwise(distortions)]
    held, order = [0] * len(weight), []
    for _ in range(8 * len(weight)):
        worth = [w * gains[b] if b < 8 else -1.0 for w, b in zip(weight, held, strict=True)]
        best = worth.index(max(worth))
        held[best] += 1
        order.append(best)
    return order
