"""The methods of one model: the worker's default and those that requests name."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import structlog
import torch
from qaq.v1 import common_pb2

from qaq_core import ConfigError, Method, make_method
from qaq_core.cache import PRESETS
from qaq_core.calibration import Progress, calibrate
from qaq_core.models import LoadedModel, ModelShape
from services.common.errors import Unavailable
from services.common.settings import WorkerSettings

_KEPT_METHODS = 32
_MEASURED = ("balanced", "paper")
RETRY_AFTER_MS = 1000

log = structlog.get_logger()


class Key(NamedTuple):
    """What tells methods apart."""

    preset: str
    bits: float | None
    compression: float | None
    error: float | None


class Methods:
    """Methods of a model by cache parameters. A method is made at its first use, before a thread needs it: `ready`."""

    def __init__(self, loaded: LoadedModel, settings: WorkerSettings) -> None:
        self._loaded = loaded
        self._settings = settings
        self._made: dict[Key, Method] = {}
        self._maker = ThreadPoolExecutor(1, "methods")
        self._stopped = False

    async def ready(self, params: common_pb2.CacheParams) -> None:
        """Waits until `get` has the method at once. The first use of a preset may measure the model for minutes, in a
        thread of its own, and goes on if this is cancelled.

        Raises:
            ConfigError, UnsupportedModelError: as `get`.
            Unavailable: the worker stops.
        """
        key = self._key(params)
        if key not in self._made:
            try:
                making = self._maker.submit(self._make, key, self._progress())
            except RuntimeError as error:  # it is closed
                raise _stopping() from error
            await asyncio.wrap_future(making)

    def get(self, params: common_pb2.CacheParams) -> Method:
        """The method of a session.

        Raises:
            ConfigError: the preset is unknown, or the target is out of range.
            UnsupportedModelError: the model does not work with a quantized cache.
        """
        key = self._key(params)
        return self._made.get(key) or self._make(key)

    def close(self) -> None:
        """Ends what is being measured. Methods that are made stay."""
        self._stopped = True
        self._maker.shutdown(wait=False, cancel_futures=True)

    def _key(self, params: common_pb2.CacheParams) -> Key:
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
        return Key(preset, bits, compression, error)

    def _make(self, key: Key, progress: Progress | None = None) -> Method:
        """Makes a method, or finds the one that was made meanwhile.

        Args:
            progress: of measuring the model, beside a thread that computes with it. None: no other thread uses it.
        """
        if (made := self._made.get(key)) is not None:
            return made
        if key.preset not in PRESETS:
            # Families of presets, such as the baselines of an evaluation, need not store originals or resume.
            raise ConfigError(f"preset {key.preset[:50]!r} is not served; use one of {', '.join(PRESETS)}")
        model, fingerprint = self._loaded.model, self._loaded.fingerprint
        known: dict[str, Any] = {}
        if key.preset == "balanced":
            known["exceptions"] = self._settings.exceptions
        elif key.preset == "paper":
            known["exceptions"] = self._settings.exceptions != "off"
        # Measuring needs gradients.
        with torch.inference_mode(False), torch.enable_grad():
            if progress is not None and key.preset in _MEASURED:
                known["calibration"] = calibrate(twin(model), ModelShape.of(model), fingerprint, progress)
            method = make_method(
                model,
                fingerprint=fingerprint,
                preset=key.preset,
                target_bits=key.bits,
                target_compression=key.compression,
                target_error=key.error,
                page_tokens=self._settings.page_tokens,
                **known,
            )
        self._made[key] = method
        if len(self._made) > _KEPT_METHODS:
            del self._made[next(iter(self._made))]
        return method

    def _progress(self) -> Progress:
        """Logs each tenth of a measurement, and ends it when the worker stops."""
        last: tuple[str, int] | None = None

        def report(stage: str, done: float) -> None:
            nonlocal last
            if self._stopped:
                raise _stopping()
            if last != (now := (stage, int(done * 10))):
                last = now
                log.info("a preset is measured for its first use", stage=stage, done=round(done, 2))

        return report


def twin(model: Any) -> Any:
    """A model of the same weights, whose attention may be exchanged while another thread computes with the first."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        memo |= {id(tensor): tensor for tensor in held if isinstance(tensor, torch.Tensor)}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        vars(module).pop("forward", None)  # a compiled one is of the first model
    return copied


def _stopping() -> Unavailable:
    return Unavailable("the worker stopped; send the request again", retry_after_ms=RETRY_AFTER_MS)
