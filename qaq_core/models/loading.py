"""Models from a local directory, a GGUF file or the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qaq_core.base.errors import ConfigError, ModelLoadError
from qaq_core.models.checkpoint import Checkpoint, first_line, locate
from qaq_core.models.fingerprint import leave_fingerprint
from qaq_core.models.gguf import Progress, converted_model, quiet, silent
from qaq_core.models.linear import LOSSLESS, pack
from qaq_core.models.tokenizer import tokenizer_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: in eval mode, on its device. tokenizer: as transformers makes it.
        fingerprint: hex; the same weights and configuration have the same one wherever they were found.
        context_length: tokens the model was made for.
        weights: form of its linear layers, one of `linear.WEIGHTS` but "auto".
    """

    model: Any
    tokenizer: Any
    name: str
    source: str
    fingerprint: str
    dtype: torch.dtype
    context_length: int
    weights: str = "plain"

    @property
    def identity(self) -> str:
        """Models with the same one make the same keys and values of the same tokens."""
        return self.fingerprint if self.weights in LOSSLESS else f"{self.fingerprint}/{self.weights}"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)


def load_model(
    source: str,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
    weights: str = "plain",
) -> LoadedModel:
    """A causal language model with its tokenizer. The model knows its fingerprint from then on.

    Args:
        source: a local directory, a .gguf file or a hub id.
        dtype: "float32", "float16", "bfloat16", or "auto": float32 on a CPU, elsewhere the checkpoint's own
            half precision or else bfloat16.
        progress: called with a stage and how much of it is done, 0 to 1.
        weights: form of the linear layers, see `linear.pack`.
    Raises:
        ModelLoadError: with what to do about it.
        ConfigError: unknown device, dtype or weights, or not for this machine.
    """
    progress = progress or silent
    place = device_of(device)
    checkpoint = locate(source, with_weights=True)
    progress("reading", 0.0)
    fingerprint = checkpoint.fingerprint()
    progress("reading", 1.0)
    resolved = _dtype(dtype, place, checkpoint)
    directory = checkpoint.path
    if checkpoint.is_gguf:
        directory = converted_model(checkpoint.path, fingerprint, resolved, progress)
    tokenizer = tokenizer_of(checkpoint, progress)
    progress("loading weights", 0.0)
    model = _weights(directory, resolved, place, source)
    weights = pack(model, weights)
    leave_fingerprint(model, fingerprint)
    progress("loading weights", 1.0)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not context:
        raise ModelLoadError(f"{source} does not say how long its context is (max_position_embeddings)")
    return LoadedModel(model, tokenizer, checkpoint.name, source, fingerprint, resolved, int(context), weights)


def _weights(directory: Path, dtype: torch.dtype, device: torch.device, source: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"{source} does not fit on {device}; take a smaller model") from error
    except Exception as error:
        raise ModelLoadError(
            f"{source} cannot be loaded from {directory}: {first_line(error)}; "
            "it must be a causal language model with complete files (delete a damaged copy and load it again)"
        ) from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise ModelLoadError(
            f"{source} lacks {len(info['missing_keys'])} weights, among them {first}; download it again"
        )
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ModelLoadError(f"{source} is damaged: {name} holds NaN or infinity; download it again")
    return model.eval()


def device_of(device: str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}; take cpu, cuda or cuda:N") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{device} is not there: torch sees {torch.cuda.device_count()} CUDA devices; take cpu")
    return place


def _dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"unknown dtype {name!r}; take auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    own = None if checkpoint.is_gguf else _config(checkpoint.path)
    half = (own or {}).get("dtype") or (own or {}).get("torch_dtype")
    return torch.float16 if half == "float16" else torch.bfloat16


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise ModelLoadError(f"{directory}/config.json is damaged; download it again ({error})") from error
    return config if isinstance(config, dict) else {}
