"""The quantizer: a transform and a codec. Worker and cache service run this same code."""

from __future__ import annotations

import copy
import json
from dataclasses import fields

import numpy as np
import torch
from blake3 import blake3
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from qaq_core.base.errors import ConfigError, QuantizationError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.rows import RowRequest
from qaq_core.base.widths import HALF
from qaq_core.quantization.bit_planes import RowLayout
from qaq_core.quantization.codecs import Codec, make_codec
from qaq_core.quantization.encoder import Encoder, MakeEncoder, spread, torch_encoder
from qaq_core.quantization.transforms import IdentityTransform, LinearTransform, Transform
from qaq_core.quantization.transforms.rotation import Rotation

VERSION = 1
"""Of a quantizer's bytes. They do not say it as long as it is 1."""
_SETTINGS = "codec_settings"
_MEANS = ("key_mean", "value_mean")


class Quantizer:
    """Makes packed rows of originals.

    Args:
        make_encoder: chooses the encoder of a device.

    Attributes:
        id: 16 bytes, hash of transform and codec; the cache service finds them by it.
        meta_bytes: scale bytes of a row.
        base: the model's quantizer that this sequence's own one extends, or None.
    """

    def __init__(
        self,
        transform: Transform,
        codec: Codec,
        base: Quantizer | None = None,
        make_encoder: MakeEncoder = torch_encoder,
    ) -> None:
        self.transform, self.codec, self.base, self._make_encoder = transform, codec, base, make_encoder
        self.meta_bytes = codec.meta_bytes
        self._layouts: dict[tuple[int, int], RowLayout] = base._layouts if base else {}
        self._encoders: dict[str, Encoder] = {}
        self._transforms: dict[str, Transform] = {}
        self.id = blake3(self.to_bytes()).digest(16)

    def using(self, make_encoder: MakeEncoder) -> Quantizer:
        """The same quantizer with other encoders, which produce the same bits."""
        other = copy.copy(self)
        other._make_encoder, other._encoders = make_encoder, {}
        return other

    def centered_on(self, originals: torch.Tensor, start: int) -> Quantizer:
        """A sequence's own quantizer, centered on those tokens, see `Transform.centered_on`. It extends this one."""
        return Quantizer(self.transform.centered_on(originals, start), self.codec, self, self._make_encoder)

    def rotated(self, rotation: tuple[Rotation, Rotation]) -> Quantizer:
        """A sequence's own quantizer with a rotation of keys and of values."""
        assert isinstance(self.transform, LinearTransform), "only linear transforms are rotated"
        return Quantizer(self.transform.rotated(rotation), self.codec, self.base, self._make_encoder)

    @property
    def own_bytes(self) -> int:
        """Bytes of the tensors that a sequence does not share with others."""
        held = sum(tensor.nbytes for tensor in self._own_tensors().values())
        return held + self.transform.kept_bytes

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        if self.base is None:
            return {}
        assert isinstance(self.transform, LinearTransform)
        return self.transform.own_tensors()

    def spread(self, scale: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Scales per row [..., 1 or 2] as scales per dim [..., 1 or head_dim]."""
        return spread(scale, head_dim, self.codec.split)

    def layout(self, side: int, head_dim: int) -> RowLayout:
        """Which plane of which octet each byte of a row holds.

        Raises:
            ConfigError: the codec is for rows of another size.
        """
        key = (side, head_dim)
        if key not in self._layouts:
            order = self.codec.order(side, head_dim)
            if len(order) != head_dim:
                raise ConfigError(f"the codec is for a head_dim of {len(order)}, not {head_dim}")
            self._layouts[key] = RowLayout(order)
        return self._layouts[key]

    def rows(self, side: int, originals: torch.Tensor, start: int, overwrite: bool = False) -> torch.Tensor:
        """Transformed rows of consecutive positions.

        Args:
            originals: [layers, kv_heads, tokens, head_dim] of positions start, start+1, ….
            overwrite: the originals are not needed any more, and rows may overwrite them.
        Returns:
            float32, same shape.
        Raises:
            QuantizationError: NaN or infinite; names the layer.
        """
        rows, bad = self.encoder(originals.device).rows(side, originals, start, overwrite)
        if bad is not None:
            raise QuantizationError(f"layer {bad}: {'value' if side else 'key'} rows hold NaN or infinity")
        return rows

    def meta(self, rows: torch.Tensor, excluded: torch.Tensor | None = None) -> torch.Tensor:
        """Meta bytes of rows [layers, kv_heads, tokens, head_dim], see `Codec.meta`."""
        return self.encoder(rows.device).meta(rows, excluded)

    def encode(self, side: int, rows: torch.Tensor, meta: torch.Tensor, have: int, want: int) -> torch.Tensor:
        """The bytes that rows [n, head_dim] lack from width `have` to width `want`: uint8 [n, bytes]."""
        widths = torch.tensor([have, want], dtype=torch.uint8, device=rows.device)
        held, wanted = widths[:, None].expand(-1, len(rows))
        return self.encode_each(side, rows, meta, held, wanted)[0].view(len(rows), -1)

    def encode_each(
        self, side: int, rows: torch.Tensor, meta: torch.Tensor, have: torch.Tensor, want: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes that each row lacks from width `have` to width `want`; all of a row for HALF.

        Args:
            rows: float32 [..., head_dim], n in all. meta: uint8 [n, meta_bytes].
            have, want: uint8 [n] of WIDTHS, have <= want or want = HALF.
        Returns:
            uint8 bytes, one row after another; int64 [n], offset of each row.
        """
        sizes = torch.where(want == HALF, HALF, want.long() - have) * rows.shape[-1] // 16
        begin, out = _room(sizes)
        self.encoder(rows.device).encode(side, rows, meta, have, want, begin, out)
        return out, begin

    def requantize(self, request: RowRequest, originals: torch.Tensor) -> np.ndarray:
        """The bytes that the rows of a request lack, one row after another.

        Args:
            originals: float [n, head_dim], the request's rows in full precision.
        Returns:
            uint8 bytes, as `RowReply.planes`.
        """
        layer, head, position = (
            torch.from_numpy(getattr(request, name).astype(np.int64)) for name in ("layer", "head", "position")
        )
        have, want, meta = (torch.from_numpy(getattr(request, name).copy()) for name in ("have", "want", "meta"))
        begin, answer = _room(torch.from_numpy(request.payload_bytes()))
        encoder = self.encoder(originals.device)
        for side in (KEY, VALUE):
            mine = torch.from_numpy(np.flatnonzero(request.side == side))
            if len(mine):
                rows = encoder.rows_at(side, originals[mine], layer[mine], head[mine], position[mine])
                encoder.encode(side, rows, meta[mine], have[mine], want[mine], begin[mine], answer)
        raw: np.ndarray = answer.numpy()
        return raw

    def encoder(self, device: torch.device) -> Encoder:
        """The encoder of a device, made once."""
        if device.type not in self._encoders:
            made = self._make_encoder(self.transform_on(device), self.codec, self.layout, device)
            self._encoders[device.type] = made
        return self._encoders[device.type]

    def transform_on(self, device: torch.device) -> Transform:
        """The transform with its tables on a device: originals are on the host, wherever a sequence is.

        A sequence's own transform shares the tables of the model's there.
        """
        if device.type not in self._transforms:
            transform = self.transform
            if self.base is None or not isinstance(transform, LinearTransform):
                made = transform.to(device)
            elif transform.key_mean.device == device:
                made = transform
            else:
                model = self.base.transform_on(device)
                assert isinstance(model, LinearTransform)
                made = model.adapted_as(transform)
            self._transforms[device.type] = made
        return self._transforms[device.type]

    def to_bytes(self) -> bytes:
        """Transform and codec as safetensors; for a sequence's own quantizer the base's id and its own tensors.

        Equal quantizers give equal bytes.
        """
        described: dict[str, object] = {"transform": self.transform.name, "codec": self.codec.settings()}
        if self.base is not None:
            described = {"base": self.base.id.hex()}
        note = torch.frombuffer(bytearray(json.dumps(described, sort_keys=True).encode()), dtype=torch.uint8)
        # Clones: safetensors refuses tensors that share memory, as tables of keys and values may.
        held = self.transform.tensors() if self.base is None else self._own_tensors()
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in held.items()}
        return save_tensors({**tensors, _SETTINGS: note})

    @staticmethod
    def base_of(raw: bytes) -> bytes | None:
        """Id of the base quantizer that `from_bytes` needs, or None."""
        base = json.loads(bytes(load_tensors(raw)[_SETTINGS].numpy())).get("base")
        return None if base is None else bytes.fromhex(base)

    @classmethod
    def from_bytes(
        cls, raw: bytes, base: Quantizer | None = None, make_encoder: MakeEncoder = torch_encoder
    ) -> Quantizer:
        """The quantizer that `to_bytes` wrote; `base` is the one that `base_of` names."""
        tensors = load_tensors(raw)
        described = json.loads(bytes(tensors.pop(_SETTINGS).numpy()))
        if described.get("version", VERSION) != VERSION:
            raise ConfigError(f"a quantizer of version {described['version']} was made by another release")
        if "base" in described:
            if base is None or base.base is not None or not isinstance(base.transform, LinearTransform):
                raise ConfigError("a sequence's own means need a base quantizer with a linear transform")
            transform = base.transform.with_means(*(tensors.pop(name) for name in _MEANS))
            return cls(
                transform.rotated(_rotation_of(tensors)) if tensors else transform, base.codec, base, make_encoder
            )
        transforms = {IdentityTransform.name: IdentityTransform, LinearTransform.name: LinearTransform}
        if described["transform"] not in transforms:
            raise ConfigError(f"unknown transform {described['transform']!r}")
        return cls(transforms[described["transform"]](**tensors), make_codec(**described["codec"]), None, make_encoder)


def _rotation_of(tensors: dict[str, torch.Tensor]) -> tuple[Rotation, Rotation]:
    """The rotations of keys and values, from the tensors that `LinearTransform.own_tensors` names."""
    names = [field.name for field in fields(Rotation)]
    sides = [[f"{side}_{name}" for name in names] for side in ("key", "value")]
    if set(tensors) != {*sides[KEY], *sides[VALUE]}:
        raise ConfigError(f"{', '.join(tensors)} are not the tensors of a rotation")
    keys, values = (Rotation(*(tensors[name] for name in side)) for side in sides)
    return keys, values


def _room(sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets int64 [n] of rows of those sizes, one after another; and memory for all of them."""
    if len(sizes) and int(sizes.min()) < 0:
        raise ValueError("a row can only be encoded from a narrower width to a wider one")
    return sizes.cumsum(0) - sizes, torch.empty(int(sizes.sum()), dtype=torch.uint8, device=sizes.device)
