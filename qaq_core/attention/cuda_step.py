"""The kernels of one decode step: their arguments, made once, and scratch that all layers share."""

from __future__ import annotations

import torch

from qaq_core.kernels.cuda import structures
from qaq_core.kernels.cuda.launcher import Launcher
from qaq_core.kernels.cuda.structures import DTYPES, QUAD

THREADS = 128
OBSERVED = 256
"""Positions of a block of `observe`."""


class StepKernels:
    """`prepare`, `split`, `merge` and `observe` for the sequences of a batch, layer by layer.

    Args:
        steps: uint8, a `Step` for each sequence, on the device; lives as long as this.
        dims: batch, KV heads, query heads, head_dim.
        blocks: of packed tokens, of the sequence that has most.
        dtype: of queries and new tokens. exact_dtype: of exact tokens. out_dtype: of results.
        observed: tokens of the longest sequence whose statistic is wanted, or 0.
    """

    def __init__(
        self,
        launcher: Launcher,
        steps: torch.Tensor,
        dims: tuple[int, int, int, int],
        blocks: int,
        dtype: torch.dtype,
        exact_dtype: torch.dtype,
        out_dtype: torch.dtype,
        observed: int = 0,
    ) -> None:
        batch, heads, query_heads, dim = dims
        group = query_heads // heads
        quads = -(-group // QUAD)
        self._launcher, self._steps, self._dims, self._out_dtype = launcher, steps, dims, out_dtype
        self._grid, self._blocks, self._observed = (heads * quads, batch, 1), blocks, observed
        device, rows = steps.device, (batch, heads, quads)
        self._held = [
            *torch.empty(3, *rows, QUAD, dim, device=device).unbind(),  # asked, framed, turned
            torch.empty(*rows, dim // 16, 32, 4, device=device),  # fragments
            torch.empty(*rows, 2, QUAD, device=device),  # factors
            torch.empty(*rows, blocks, QUAD, dim, device=device),  # sums
            torch.empty(*rows, blocks, QUAD, 2, device=device),  # norms
            torch.empty(batch, query_heads, 2, device=device),  # totals
        ]
        asked, framed, turned, fragments, factors, sums, norms, totals = (part.data_ptr() for part in self._held)
        given = structures.Batch(steps.data_ptr(), 0, batch, heads, group, quads, blocks, DTYPES[exact_dtype], 0)
        none = structures.Layout()
        self._prepare = structures.PrepareArgs(given, none, dtype=DTYPES[dtype], asked=asked, framed=framed)
        self._prepare.turned, self._prepare.fragments, self._prepare.factors = turned, fragments, factors
        self._split = structures.SplitArgs(given, none, framed, fragments, turned, factors, sums, norms)
        self._merge = structures.MergeArgs(given, none, asked, sums, norms, out_dtype=DTYPES[out_dtype], totals=totals)
        self._observe = structures.ObserveArgs(given, totals)
        self._calls = [self._prepare, self._merge, *([self._split] if blocks else [])]

    def layer(
        self,
        index: int,
        layout: structures.Layout | None,
        scaling: float,
        sliding_window: int | None,
        query: torch.Tensor,
        added: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Launches a layer's kernels.

        Args:
            index: of the layer, among those that steps describe. layout: None without packed tokens.
            query: [batch, query_heads, head_dim], contiguous.
            added: new keys and values [batch, kv_heads, head_dim], contiguous; None if they are among the exact ones.
        Returns:
            [batch, query_heads, head_dim].
        """
        batch, _, query_heads, dim = self._dims
        out = torch.empty(batch, query_heads, dim, dtype=self._out_dtype, device=query.device)
        for args in (*self._calls, self._observe):
            args.batch.layer, args.batch.scaling, args.batch.window = index, scaling, sliding_window or 0
        if layout is not None:
            for args in self._calls:
                args.layout = layout
        self._prepare.query, self._merge.out = query.data_ptr(), out.data_ptr()
        for side, new in enumerate(added or ()):
            self._prepare.added[side] = new.data_ptr()
        launch = self._launcher.launch
        launch("prepare", dim, self._grid, THREADS, self._prepare)
        if self._blocks:
            launch("split", dim, (self._blocks, self._grid[0], batch), self._launcher.threads, self._split)
        launch("merge", dim, self._grid, THREADS, self._merge)
        if self._observed:
            grid = -(-self._observed // OBSERVED), self._dims[1], batch
            launch("observe", dim, grid, OBSERVED, self._observe)
        return out
