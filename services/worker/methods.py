"""The methods of one model: the worker's default and those that requests name."""

from __future__ import annotations

import functools

import torch
from qaq.v1 import common_pb2

from qaq_core import ConfigError, Method, make_method
from qaq_core.cache import PRESETS
from qaq_core.models import LoadedModel
from services.common.settings import WorkerSettings

_CACHED_METHODS = 32


class Methods:
    """Methods of a model by cache parameters. A method is made at its first use. Used by one thread alone."""

    def __init__(self, loaded: LoadedModel, settings: WorkerSettings) -> None:
        self._loaded = loaded
        self._settings = settings
        self._make = functools.lru_cache(maxsize=_CACHED_METHODS)(self._new)

    def get(self, params: common_pb2.CacheParams) -> Method:
        """The method of a session.

        Raises:
            ConfigError: the preset is unknown, or the target is out of range.
            UnsupportedModelError: the model does not work with a quantized cache.
        """
        preset = params.preset if params.HasField("preset") else self._settings.preset
        bits = params.target_bits if params.HasField("target_bits") else None
        compression = params.target_compression if params.HasField("target_compression") else None
        error = params.target_error if params.HasField("target_error") else None
        if error is not None:
            bits = compression = None
        elif compression is not None:
            bits = None
        elif bits is None and preset == self._settings.preset:
            bits = self._settings.target_bits
        return self._make(preset, bits, compression, error)

    def _new(self, preset: str, bits: float | None, compression: float | None, error: float | None) -> Method:
        if preset not in PRESETS:
            # Families of presets, such as the baselines of an evaluation, need not store originals or resume.
            raise ConfigError(f"preset {preset[:50]!r} is not served; use one of {', '.join(PRESETS)}")
        # The first use may calibrate the model, which needs gradients.
        with torch.inference_mode(False), torch.enable_grad():
            return make_method(
                self._loaded.model,
                fingerprint=self._loaded.fingerprint,
                preset=preset,
                target_bits=bits,
                target_compression=compression,
                target_error=error,
                page_tokens=self._settings.page_tokens,
            )
