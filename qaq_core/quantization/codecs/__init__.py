"""Codecs by name."""

from __future__ import annotations

from typing import Any

from qaq_core.base.errors import ConfigError
from qaq_core.quantization.codecs.base import Codec
from qaq_core.quantization.codecs.gaussian import GaussianCodec
from qaq_core.quantization.codecs.grouped import GroupedCodec, NormalCodec, UniformCodec
from qaq_core.quantization.codecs.progressive import ProgressiveCodec

_CODECS: dict[str, Any] = {cls.name: cls for cls in (GaussianCodec, ProgressiveCodec, UniformCodec, NormalCodec)}

__all__ = ["Codec", "GaussianCodec", "GroupedCodec", "NormalCodec", "ProgressiveCodec", "UniformCodec", "make_codec"]


def make_codec(name: str, **settings: Any) -> Codec:
    """The codec of that name; `codec.settings()` gives the arguments of an existing one."""
    if name not in _CODECS:
        raise ConfigError(f"no codec is called {name!r}; there are {', '.join(sorted(_CODECS))}")
    codec: Codec = _CODECS[name](**settings)
    return codec
