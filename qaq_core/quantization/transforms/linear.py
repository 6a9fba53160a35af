"""Linear transform: rows are centered and multiplied with a matrix of their layer and head.

    key   y = K·(k - RoPE(μ, t))     score  q·k = (K⁻ᵀ·q)·y + q·RoPE(μ, t)
    value y = V·(v - μ_V)            output Σp·v = V⁻¹·Σp·y + (Σp)·μ_V

μ is the mean of a head's keys before RoPE, t the token's position. The means are the model's, from its
calibration, or a sequence's own (`centered_on`), which leave less to quantize. A long sequence also has a
rotation of its own (`rotated`), applied last. Worker and cache service must make the same rows, in torch or in
C++ (`encoder`): products are taken in double precision and rounded once, so that the order of their sums
does not show.
"""

from __future__ import annotations

import copy

import torch

from qaq_core.base.errors import ConfigError
from qaq_core.base.pages import KEY, VALUE
from qaq_core.base.rope import Angles, rotate_pairs
from qaq_core.quantization.transforms.rotation import Rotation

PRIOR_TOKENS = 32
"""A sequence's own means are drawn towards the model's as if this many of its tokens had been like those."""


MAX_KINDS = 4
"""Sets of RoPE's frequencies that layers may choose from; each has a table of all positions."""


class LinearTransform:
    """Centered rows times a matrix.

    Args:
        key_matrix, value_matrix: K and V [layers, kv_heads, head_dim, head_dim], invertible, of any dtype.
        key_mean: [layers, kv_heads, head_dim], mean of the keys before RoPE (after it, for a model without).
        value_mean: [layers, kv_heads, head_dim].
        frequencies: float64 [kinds, head_dim/2], RoPE's angle per position and pair (i, i + head_dim/2).
        kind: int64 [layers], which frequencies a layer uses.

    Attributes:
        rotation: of keys and values, applied last, or None.
    Raises:
        ConfigError: shapes, types or numbers are not these. C++ reads the tables unchecked.
    """

    name = "linear"
    rotation: tuple[Rotation, Rotation] | None = None

    def __init__(
        self,
        key_matrix: torch.Tensor,
        value_matrix: torch.Tensor,
        key_mean: torch.Tensor,
        value_mean: torch.Tensor,
        frequencies: torch.Tensor,
        kind: torch.Tensor,
    ) -> None:
        _check_tables(key_matrix, value_matrix, key_mean, value_mean, frequencies, kind)
        self.key_matrix, self.value_matrix = key_matrix, value_matrix
        self.key_mean, self.value_mean = key_mean.float(), value_mean.float()
        self.frequencies, self.kind = frequencies.double(), kind.long()
        self.matrices = (key_matrix.float().mT.contiguous(), value_matrix.float().mT.contiguous())
        """Of keys and values: [.., dim of the original, dim of the row]."""
        key_inverse, value_inverse = (torch.linalg.inv(matrix.double().mT).float() for matrix in self.matrices)
        self._key_inverse, self._output_map = key_inverse.contiguous(), value_inverse.mT.contiguous()
        self._turned: tuple[torch.Tensor, torch.Tensor] | None = None
        self._angles = Angles(self.frequencies, key_matrix.device)
        self._kinds: list[int] = self.kind.tolist()

    @property
    def kinds(self) -> list[int]:
        """Which frequencies each layer uses."""
        return self._kinds

    def to(self, device: torch.device) -> LinearTransform:
        if device == self.key_mean.device:
            return self
        made = LinearTransform(**{name: tensor.to(device) for name, tensor in self.tensors().items()})
        return made.adapted_as(self)

    def adapted_as(self, other: LinearTransform) -> LinearTransform:
        """This transform with the means and the rotation of another one, on the device of this one."""
        device = self.key_mean.device
        own = self._recentered(other.key_mean.to(device), other.value_mean.to(device))
        if other.rotation is None:
            return own
        keys, values = other.rotation
        return own.rotated((keys.to(device), values.to(device)))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "key_matrix": self.key_matrix,
            "value_matrix": self.value_matrix,
            "key_mean": self.key_mean,
            "value_mean": self.value_mean,
            "frequencies": self.frequencies,
            "kind": self.kind,
        }

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a sequence does not share with others."""
        own = {"key_mean": self.key_mean, "value_mean": self.value_mean}
        for side, rotation in zip(("key", "value"), self.rotation or (), strict=False):
            own |= {f"{side}_{name}": tensor for name, tensor in vars(rotation).items()}
        return own

    def rows(self, side: int, originals: torch.Tensor, start: int) -> torch.Tensor:
        tokens = originals.shape[2]
        rows = torch.empty(originals.shape, device=originals.device)
        mean, angles = self.centers(side, start + tokens)
        for layer, own in enumerate(originals):
            center = mean[layer].unsqueeze(1)
            if angles is not None:
                center = rotate_pairs(center, angles[self._kinds[layer], start : start + tokens])
            rows[layer] = (own.float() - center).double() @ self.matrices[side][layer].double()
            if self.rotation is not None:
                rows[layer] = self.rotation[side].rows(layer, rows[layer])
        return rows

    def rows_at(
        self, side: int, originals: torch.Tensor, layer: torch.Tensor, head: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        center = (self.value_mean if side else self.key_mean)[layer, head]
        if side == KEY:
            center = rotate_pairs(center, self._angles.at(self.kind[layer], position))
        centered = (originals.float() - center).double()
        rows = torch.empty(originals.shape, device=originals.device)
        heads = self.key_mean.shape[1]
        place = layer * heads + head
        order = place.argsort()
        counts = torch.bincount(place)
        present = torch.nonzero(counts).squeeze(1)
        for where, mine in zip(present.tolist(), order.split(counts[present].tolist()), strict=True):
            matrix = self.matrices[side][where // heads, where % heads].double()
            rows[mine] = (centered[mine] @ matrix).float()
            if self.rotation is not None:
                rows[mine] = self.rotation[side].head_rows(where // heads, where % heads, rows[mine])
        return rows

    def centers(self, side: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What rows are centered on.

        Returns:
            means [layers, kv_heads, head_dim]; RoPE's cosines and sines [kinds, >= stop, head_dim] that are applied to
            them, None for values.
        """
        return (self.key_mean, self._angles(stop)) if side == KEY else (self.value_mean, None)

    def angles_far(self, layer: torch.Tensor, position: torch.Tensor) -> torch.Tensor | None:
        """RoPE's cosines and sines [n, head_dim] of single positions, if a table of all up to there is too large."""
        far = self._angles.far(int(position.max()) + 1)
        return self._angles.at(self.kind[layer], position) if far else None

    def query(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        inverse = self._own_maps()[KEY][layer]
        return (query.reshape(len(inverse), -1, query.shape[-1]) @ inverse).view(query.shape)

    def center_scores(self, layer: int, query: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
        group = query.shape[0] // self.key_mean.shape[1]
        mean = self.key_mean[layer].repeat_interleave(group, 0).unsqueeze(1)
        q1, q2 = query.chunk(2, -1)
        m1, m2 = mean.chunk(2, -1)
        weights = torch.cat([q1 * m1 + q2 * m2, q2 * m1 - q1 * m2], -1)
        return weights @ self._angles(stop)[self._kinds[layer], start:stop].T

    def center(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_mean[layer], self._angles(stop)[self._kinds[layer]]

    def restore(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        back = self._own_maps()[VALUE][layer]
        return (output.reshape(len(back), -1, output.shape[-1]) @ back).view(output.shape)

    def value_center(self, layer: int) -> torch.Tensor | None:
        return self.value_mean[layer]

    def centered_on(self, originals: torch.Tensor, start: int) -> LinearTransform:
        tokens = originals.shape[3]
        angles = self._angles(start + tokens)[:, start : start + tokens]
        cos, sin = angles.chunk(2, -1)
        back = torch.cat([cos, -sin], -1)
        own = torch.stack(
            [
                torch.stack([rotate_pairs(keys.float(), back[kind]).mean(1), values.float().mean(1)])
                for (keys, values), kind in zip(originals, self._kinds, strict=True)
            ],
            1,
        )
        share = tokens / (tokens + PRIOR_TOKENS)
        return self._recentered(*(torch.stack([self.key_mean, self.value_mean]).lerp(own, share)))

    def with_means(self, key_mean: torch.Tensor, value_mean: torch.Tensor) -> LinearTransform:
        """The same transform with other means; the matrices are shared."""
        for name, mean in (("key_mean", key_mean), ("value_mean", value_mean)):
            _check(name, mean, tuple(self.key_mean.shape))
        return self._recentered(key_mean, value_mean)

    def _recentered(self, key_mean: torch.Tensor, value_mean: torch.Tensor) -> LinearTransform:
        other = copy.copy(self)
        other.key_mean, other.value_mean = key_mean.float(), value_mean.float()
        return other

    def rotated(self, rotation: tuple[Rotation, Rotation]) -> LinearTransform:
        """The same transform followed by a rotation of keys and of values."""
        layers, heads, dim = self.key_mean.shape
        if any(one.shape != (layers, heads, dim) for one in rotation):
            raise ConfigError(f"a rotation must be for {layers} layers, {heads} KV heads and head_dim {dim}")
        other = copy.copy(self)
        other.rotation, other._turned = rotation, None
        return other

    def maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._key_inverse, self._output_map

    @property
    def kept_bytes(self) -> int:
        """Bytes of matrices that are this transform's own and kept from their first use on."""
        return sum(part.nbytes for part in self._turned or ())

    def _own_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`maps` with the rotation: made at its first use, since it never changes, and kept."""
        if self.rotation is None:
            return self._key_inverse, self._output_map
        if self._turned is None:
            keys, values = self.rotation
            layers = range(len(self._kinds))
            inverse = [self._key_inverse[layer].double() @ keys.query_map(layer) for layer in layers]
            back = [values.output_map(layer) @ self._output_map[layer].double() for layer in layers]
            self._turned = torch.stack(inverse).float(), torch.stack(back).float()
        return self._turned


def _check_tables(
    key_matrix: torch.Tensor,
    value_matrix: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    frequencies: torch.Tensor,
    kind: torch.Tensor,
) -> None:
    if key_mean.dim() != 3 or not key_mean.numel() or key_mean.shape[2] % 16:
        raise ConfigError(
            f"key_mean is {list(key_mean.shape)} and must be [layers, kv_heads, head_dim], head_dim a multiple of 16"
        )
    layers, heads, dim = key_mean.shape
    for name, tensor in (("key_mean", key_mean), ("value_mean", value_mean)):
        _check(name, tensor, (layers, heads, dim))
    for name, tensor in (("key_matrix", key_matrix), ("value_matrix", value_matrix)):
        _check(name, tensor, (layers, heads, dim, dim))
    if frequencies.dim() != 2 or not 1 <= len(frequencies) <= MAX_KINDS:
        raise ConfigError(
            f"frequencies is {list(frequencies.shape)} and must be [kinds, {dim // 2}], with 1 to {MAX_KINDS} kinds"
        )
    _check("frequencies", frequencies, (len(frequencies), dim // 2))
    if kind.shape != (layers,):
        raise ConfigError(f"kind is {list(kind.shape)} and must be [{layers}]")
    named = kind.long()
    if not 0 <= int(named.min()) <= int(named.max()) < len(frequencies):
        raise ConfigError(f"kind must name one of {len(frequencies)} rows of frequencies for each layer")


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or not tensor.is_floating_point():
        raise ConfigError(f"{name} is {tensor.dtype} {list(tensor.shape)} and must be floats {list(shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"{name} holds NaN or infinity")
