"""Rows of pools put in order by the kernel `weave`, see weave.h."""

from __future__ import annotations

import torch

from qaq_core.kernels.cuda.launcher import Launcher
from qaq_core.kernels.cuda.structures import WeaveArgs
from qaq_core.storage.repack import Moves
from qaq_core.storage.tiled_pool import Tiles, Weaver, place_runs

THREADS = 128
ALL_KEPT = 255


class CudaWeaver(Weaver):
    """See `Weaver`; one launch for all rows of a pool."""

    def __init__(self, launcher: Launcher) -> None:
        self.block = launcher.block
        self._launcher = launcher

    def weave(
        self,
        held: Tiles,
        before: torch.Tensor,
        after: torch.Tensor,
        side: int,
        unit: int,
        moves: Moves | None = None,
        tiled: bool = True,
    ) -> Tiles:
        """See `Weaver`."""
        made = place_runs(after, side, unit, self.block, tiled)
        layers, heads, tokens = after.shape
        args = WeaveArgs(before.data_ptr(), after.data_ptr(), held.data.data_ptr(), held.runs.data_ptr())
        args.to, args.to_places = made.data.data_ptr(), made.runs.data_ptr()
        args.before_stride, args.after_stride = before.stride(1), after.stride(1)
        args.before_tokens, args.after_tokens = before.shape[2], tokens
        args.before_blocks, args.after_blocks = held.runs.shape[2], made.runs.shape[2]
        args.side, args.unit, args.tiled = side, unit, tiled
        if moves is not None:
            keep = torch.full((layers * heads * tokens,), ALL_KEPT, dtype=torch.uint8, device=after.device)
            offsets = torch.empty(keep.shape, dtype=torch.int64, device=after.device)
            keep[moves.index], offsets[moves.index] = moves.keep, moves.offsets
            planes = moves.planes.contiguous()
            args.keep, args.offsets, args.planes = keep.data_ptr(), offsets.data_ptr(), planes.data_ptr()
        if len(made.data):
            self._launcher.launch("weave", 16 * unit, (args.after_blocks, layers * heads, 1), THREADS, args)
        return made
