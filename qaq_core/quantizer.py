"""The quantizer: a frame and a codec. The worker and the cache service run this same code."""

from __future__ import annotations

import json

import numpy as np
import torch
from blake3 import blake3
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from qaq_core import codecs
from qaq_core.codecs import Codec
from qaq_core.errors import ConfigError, QuantizationError
from qaq_core.frames import Frame, PlainFrame, RotatedFrame
from qaq_core.originals import RowRequest
from qaq_core.packing import HALF, pack, pack_half

_SETTINGS = "codec_settings"


class Quantizer:
    """Makes packed rows of originals.

    Attributes:
        id: 16 bytes that name frame and codec; the cache service looks them up by it.
        meta_bytes: scale bytes of a row.
    """

    def __init__(self, frame: Frame, codec: Codec) -> None:
        self.frame, self.codec = frame, codec
        self.meta_bytes = codec.meta_bytes
        self.id = blake3(self.to_bytes()).digest(16)

    def rows(self, side: int, originals: torch.Tensor, start: int, first_layer: int = 0) -> torch.Tensor:
        """Rows to quantize of consecutive positions.

        Args:
            originals: [layers, kv_heads, tokens, head_dim] of positions start, start+1, ….
        Returns:
            float32, same shape.
        Raises:
            QuantizationError: NaN or infinite; names the layer.
        """
        layers, heads, tokens, _ = originals.shape
        device = originals.device
        rows = self.frame.rows(
            side,
            originals,
            torch.arange(first_layer, first_layer + layers, device=device)[:, None, None],
            torch.arange(heads, device=device)[None, :, None],
            torch.arange(start, start + tokens, device=device)[None, None, :],
        )
        finite = torch.isfinite(rows.sum((1, 2, 3)))
        if not bool(finite.all()):
            bad = int(torch.nonzero(~finite)[0, 0]) + first_layer
            raise QuantizationError(f"layer {bad}: {'value' if side else 'key'} rows hold NaN or infinity")
        return rows

    def encode(self, rows: torch.Tensor, meta: torch.Tensor, have: int, want: int) -> torch.Tensor:
        """Planes have..want-1 (or all half-precision bytes) of rows.

        Args:
            rows: float32 [n, head_dim]. meta: uint8 [n, meta_bytes].
        Returns:
            uint8 [n, planes, head_dim/8].
        """
        scale, offset = self.codec.affine(meta)
        units = (rows if offset is None else rows - offset.unsqueeze(-1)) / scale.unsqueeze(-1)
        return pack_half(units) if want == HALF else pack(self.codec.codes(units), have, want)

    def encode_each(
        self, rows: torch.Tensor, meta: torch.Tensor, have: torch.Tensor, want: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What rows lack that have some planes and want others, see `encode`.

        Args:
            rows: float32 [n, head_dim]. meta: uint8 [n, meta_bytes]. have, want: uint8 [n].
        Returns:
            uint8 bytes, one row after another; int64 [n], where a row's begin.
        """
        sizes = torch.where(want == HALF, HALF, want.long() - have) * (rows.shape[1] // 8)
        offsets = sizes.cumsum(0) - sizes
        out = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=rows.device)
        kinds = have.long() * 256 + want
        for kind in kinds.unique().tolist():
            mine = torch.nonzero(kinds == kind).squeeze(1)
            planes = self.encode(rows[mine], meta[mine], kind // 256, kind % 256).view(len(mine), -1)
            out[offsets[mine][:, None] + torch.arange(planes.shape[1], device=rows.device)] = planes
        return out, offsets

    def requantize(self, request: RowRequest, originals: torch.Tensor) -> np.ndarray:
        """Packed planes of a request's rows, one row after another.

        Args:
            originals: float [n, head_dim], the request's rows in full precision.
        Returns:
            uint8 bytes, as `RowReply.planes`.
        """
        layer, head, position, side, have, want = (
            torch.from_numpy(getattr(request, name).astype(np.int64))
            for name in ("layer", "head", "position", "side", "have", "want")
        )
        rows = torch.empty(originals.shape)
        for one in side.unique().tolist():
            mine = torch.nonzero(side == one).squeeze(1)
            rows[mine] = self.frame.rows(one, originals[mine], layer[mine], head[mine], position[mine])
        made: np.ndarray = self.encode_each(rows, torch.from_numpy(request.meta), have, want)[0].numpy()
        return made

    def to_bytes(self) -> bytes:
        """Frame and codec as safetensors; the same tables give the same bytes."""
        described = {"frame": self.frame.name, "codec": self.codec.settings()}
        note = torch.frombuffer(bytearray(json.dumps(described, sort_keys=True).encode()), dtype=torch.uint8)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.frame.tensors().items()}
        return save_tensors({**tensors, _SETTINGS: note})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Quantizer:
        tensors = load_tensors(raw)
        described = json.loads(bytes(tensors.pop(_SETTINGS).numpy()))
        frames = {PlainFrame.name: PlainFrame, RotatedFrame.name: RotatedFrame}
        if described["frame"] not in frames:
            raise ConfigError(f"unknown frame {described['frame']!r}")
        return cls(frames[described["frame"]](**tensors), codecs.make(**described["codec"]))
