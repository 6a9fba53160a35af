"""Codecs by name."""

from __future__ import annotations

from typing import Any

from qaq_core.codecs.base import Codec
from qaq_core.codecs.gaussian import GaussianCodec
from qaq_core.codecs.grouped import GroupedCodec, NormalCodec, UniformCodec
from qaq_core.codecs.progressive import ProgressiveCodec
from qaq_core.errors import ConfigError

_CODECS: dict[str, Any] = {cls.name: cls for cls in (GaussianCodec, ProgressiveCodec, UniformCodec, NormalCodec)}

__all__ = ["Codec", "GaussianCodec", "GroupedCodec", "NormalCodec", "ProgressiveCodec", "UniformCodec", "make"]


def make(name: str, **settings: Any) -> Codec:
    """The codec of that name; `codec.settings()` gives the arguments of an existing one."""
    if name not in _CODECS:
        raise ConfigError(f"no codec is called {name!r}; there are {', '.join(sorted(_CODECS))}")
    codec: Codec = _CODECS[name](**settings)
    return codec
