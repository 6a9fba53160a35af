"""Storage: packed tokens, the residual window, and the originals behind them."""

from qaq_core.storage.held_values import (
    HeldValues,
    check_held_values,
    eight_bit_codes,
    eight_bit_values,
    half_values,
    rounded,
)
from qaq_core.storage.host_pages import HostPages
from qaq_core.storage.originals import InProcessOriginals, Originals
from qaq_core.storage.packed import PackedTokens
from qaq_core.storage.pool import Pool
from qaq_core.storage.repack import Moves, Repacker, TorchRepacker
from qaq_core.storage.residual import ResidualWindow
from qaq_core.storage.staging import Staging
from qaq_core.storage.tiled_pool import TiledPool, Weaver

__all__ = [
    "HeldValues",
    "HostPages",
    "InProcessOriginals",
    "Moves",
    "Originals",
    "PackedTokens",
    "Pool",
    "Repacker",
    "ResidualWindow",
    "Staging",
    "TiledPool",
    "TorchRepacker",
    "Weaver",
    "check_held_values",
    "eight_bit_codes",
    "eight_bit_values",
    "half_values",
    "rounded",
]
