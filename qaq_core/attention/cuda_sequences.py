"""What CUDA kernels are told of sequences: structures of kernels/cuda/structures.h, filled in as arrays.

A `Resident` is that of all layers of one sequence. It stays at its address on the device, and is written again when
rows were packed or moved, so that a step in which none were has nothing to say about them.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from qaq_core.attention.cuda_tables import Tables, near_angles
from qaq_core.base.pages import KEY, VALUE
from qaq_core.kernels import addresses
from qaq_core.kernels.cuda import structures
from qaq_core.kernels.cuda.structures import NEAR
from qaq_core.quantization.codecs import Codec
from qaq_core.quantization.transforms import LinearTransform, Rotation
from qaq_core.storage.packed import PackedTokens

SEQUENCE, STEP = np.dtype(structures.Sequence), np.dtype(structures.Step)
AHEAD = 1024
"""Positions that a table of angles is made longer than it has to be."""


def staged(records: np.ndarray, device: torch.device) -> torch.Tensor:
    """The bytes of records, uint8, in memory that a device copies from while the host goes on."""
    table = torch.empty(records.nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
    table.numpy()[:] = records.reshape(-1).view(np.uint8)
    return table


class Resident:
    """What kernels read of one sequence in every layer.

    Attributes:
        table: uint8, a `Sequence` for each layer, on the device.
        blocks: of packed tokens.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.table = torch.empty(layers * SEQUENCE.itemsize, dtype=torch.uint8, device=device)
        self.blocks = 0
        self._written: tuple[int, int, int] | None = None

    def update(self, known: Describer, packed: PackedTokens, exact: torch.Tensor) -> None:
        """Writes it again if rows have changed, or exact tokens moved.

        Args:
            exact: [layers, 2, kv_heads, places, head_dim].
        """
        now = packed.version, exact.data_ptr(), exact.stride(2)
        if now == self._written:
            return
        records = known.packed(packed, range(len(exact)))
        for side in (KEY, VALUE):
            records["exact"][:, side] = addresses(exact[:, side])
            records["exact_stride"][:, side] = exact.stride(2)
        self.table.copy_(staged(records, self.table.device), non_blocking=True)
        self.blocks, self._written = int(records["blocks"][0]), now


class Describer:
    """Describes packed tokens of one codec to kernels. What it makes for tokens lives as long as they do."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self._codec, self._device = codec, device
        self._tables: dict[int, Tables] = {}
        self._layouts: dict[tuple[int, int], _Layouts] = {}
        self._factors: weakref.WeakKeyDictionary[Rotation, torch.Tensor] = weakref.WeakKeyDictionary()
        self._residents: weakref.WeakKeyDictionary[PackedTokens, Resident] = weakref.WeakKeyDictionary()

    def resident(self, packed: PackedTokens, exact: torch.Tensor) -> Resident:
        """A sequence's, up to date; see `Resident.update`."""
        mine = self._residents.get(packed)
        if mine is None:
            mine = self._residents[packed] = Resident(packed.layers, self._device)
        mine.update(self, packed, exact)
        return mine

    def packed(self, packed: PackedTokens, layers: range) -> np.ndarray:
        """SEQUENCE records of some layers; what is said of exact tokens is 0."""
        records = np.zeros(len(layers), SEQUENCE)
        if not len(packed):
            return records
        which = slice(layers.start, layers.stop)
        records["tokens"], records["start"] = len(packed), packed.start
        records["tags"], records["tag_stride"] = addresses(packed.tags)[which], packed.tags.stride(1)
        records["runs"], records["blocks"] = addresses(packed.runs)[which], packed.runs.shape[2]
        for side in (KEY, VALUE):
            meta = packed.sides[side].meta
            records["meta"][:, side] = addresses(meta.expand(packed.layers, -1, -1, -1))[which]
            records["meta_stride"][:, side] = meta.stride(1) if meta.shape[1] > 1 else 0
        transform = packed.quantizer.transform
        if isinstance(transform, LinearTransform):
            records["key_mean"] = addresses(transform.key_mean)[which]
            records["value_mean"] = addresses(transform.value_mean)[which]
            for side, rotation in enumerate(transform.rotation or ()):
                turn = records["turns"][:, side]
                turn["vectors"] = addresses(rotation.reflections)[which]
                turn["factors"] = addresses(self.factors(rotation))[which]
                turn["before"], turn["after"] = addresses(rotation.before)[which], addresses(rotation.after)[which]
        return records

    def layouts(self, packed: PackedTokens) -> list[structures.Layout]:
        """What the layers of sequences of the same matrices share, with angles for all packed tokens."""
        transform, dim = packed.quantizer.transform, packed.head_dim
        linear = transform if isinstance(transform, LinearTransform) else None
        key = dim, linear.maps()[0].data_ptr() if linear else 0
        known = self._layouts.get(key)
        if known is None:
            known = self._layouts[key] = _Layouts(self._tables_of(packed), linear, packed.layers)
        known.reach(packed.stop)
        return known.layers

    def factors(self, rotation: Rotation) -> torch.Tensor:
        """2 / |v|² of all reflections, float32 [layers, kv_heads, dim - 1]; 0 of a vector of zeros."""
        if rotation not in self._factors:
            layers, heads, dim = rotation.shape
            ends = torch.arange(dim, 1, -1, device=self._device).cumsum(0)
            sums = rotation.reflections.double().square().cumsum(-1)[..., ends - 1]
            squares = sums.diff(dim=-1, prepend=sums.new_zeros(layers, heads, 1))
            self._factors[rotation] = torch.where(squares > 0, 2 / squares.clamp_min(1), 0.0).float()
        return self._factors[rotation]

    def _tables_of(self, packed: PackedTokens) -> Tables:
        dim = packed.head_dim
        if dim not in self._tables:
            layouts = packed.quantizer.layout(KEY, dim), packed.quantizer.layout(VALUE, dim)
            self._tables[dim] = Tables(self._codec, layouts, self._device)
        return self._tables[dim]


class _Layouts:
    """The `Layout` of each layer of one model's matrices, and all that they point to."""

    def __init__(self, tables: Tables, transform: LinearTransform | None, layers: int) -> None:
        self.layers = [structures.Layout() for _ in range(layers)]
        self._tables, self._transform, self._reach = tables, transform, 0
        for layout in self.layers:
            for name in ("units", "planes", "deepest", "pools", "levels", "scales"):
                setattr(layout, name, getattr(tables, name).data_ptr())
        if transform is None:
            return
        self._maps = transform.maps()
        for layer, layout in enumerate(self.layers):
            layout.query_map, layout.output_map = (part[layer].data_ptr() for part in self._maps)

    def reach(self, stop: int) -> None:
        """Makes angles of all positions before `stop`."""
        if self._transform is None or stop <= self._reach:
            return
        self._reach = max(stop, NEAR) + AHEAD
        self._angles = [self._transform.center(layer, self._reach)[1] for layer in range(len(self.layers))]
        near: dict[int, torch.Tensor] = {}  # of the layers that share angles
        for angles in self._angles:
            if angles.data_ptr() not in near:
                near[angles.data_ptr()] = near_angles(angles)
        self._near = [near[angles.data_ptr()] for angles in self._angles]
        for layout, angles, close in zip(self.layers, self._angles, self._near, strict=True):
            layout.angles, layout.near = angles.data_ptr(), close.data_ptr()
